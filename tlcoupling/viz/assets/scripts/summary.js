tlc.sections.summary = (section, data) => {
  const several = new Set(data.coupling.map((row) => row.k)).size > 1;
  if (data.n_measured > 1) tlc.part(section, "coupling-note").append(`, mean over ${data.n_measured} tokens`);
  const number = tlc.number;
  tlc.part(section, "coupling").append(
    tlc.table(
      ["", "coupling", "null", "excess", "overlap U", "overlap V", "null K/d"],
      data.coupling.map((row) => [
        several ? `${row.sublayer}, K = ${row.k}` : row.sublayer,
        number(row.coupling),
        number(row.null),
        tlc.html("strong", {}, number(row.excess)),
        number(row.overlap_u),
        number(row.overlap_v),
        number(row.overlap_null),
      ]),
    ),
  );
  tlc.part(section, "linearity").append(
    tlc.table(
      ["path", "mean", "min", "max", "random √n"],
      data.linearity.map((row) => [
        `${row.path}, ${row.steps} steps`,
        tlc.html("strong", {}, number(row.mean, 3)),
        number(row.lowest, 3),
        number(row.highest, 3),
        number(row.random, 3),
      ]),
    ),
  );
  const growth = data.growth;
  tlc.part(section, "growth").append(
    tlc.table(
      ["over tokens", ""],
      [
        ["median ED", number(growth.median_expodistance, 3)],
        ["mean rate per layer", number(growth.mean_rate)],
        ["of which attention", number(growth.attn_share)],
        ["of which MLP", number(growth.mlp_share)],
        ["mean slope per layer", number(growth.mean_slope)],
        ["mean R²", number(growth.mean_r_squared, 3)],
      ],
    ),
  );
};
