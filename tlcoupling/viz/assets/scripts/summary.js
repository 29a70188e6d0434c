tlc.sections.summary = (section, data) => {
  const several = new Set(data.coupling.map((row) => row.k)).size > 1;
  const named = (row) => (several ? `${row.sublayer}, K = ${row.k}` : row.sublayer);
  const part = (name) => tlc.part(section, name);
  const number = tlc.number;
  const fresh = data.fresh;
  part("no-fresh").hidden = Boolean(fresh);
  if (data.n_measured > 1) part("coupling-note").append(`, mean over ${data.n_measured} tokens`);
  const tested = data.coupling.some((row) => row.p !== null);
  const undetermined = data.coupling.some((row) => row.undetermined);
  part("coupling").append(
    tlc.table(
      [
        ...["", "coupling", "null", "excess", ...(fresh ? ["fresh excess"] : [])],
        ...(tested ? ["chance alone", "95 % interval"] : []),
        ...(undetermined ? ["excess, determined pairs"] : []),
      ],
      data.coupling.map((row, i) => [
        named(row),
        number(row.coupling),
        number(row.null),
        tlc.html("strong", {}, number(row.excess)),
        ...(fresh ? [number(fresh.coupling[i].excess)] : []),
        ...(tested ? [row.p, `${number(row.excess_low)} to ${number(row.excess_high)}`] : []),
        ...(undetermined ? [number(row.excess_determined)] : []),
      ]),
    ),
  );
  part("overlap").append(
    tlc.table(
      ["", "overlap U", "its null", "overlap V", "its null"],
      data.coupling.map((row) => [named(row), ...["overlap_u", "overlap_null_u", "overlap_v", "overlap_null_v"].map((name) => number(row[name]))]),
    ),
  );
  part("linearity").append(
    tlc.table(
      ["path", "mean", ...(fresh ? ["fresh"] : []), "random √n", "min", "max"],
      data.linearity.map((row, i) => [
        `${row.path}, ${row.steps} steps`,
        tlc.html("strong", {}, number(row.mean, 3)),
        ...(fresh ? [number(fresh.linearity[i].mean, 3)] : []),
        number(row.random, 3),
        number(row.lowest, 3),
        number(row.highest, 3),
      ]),
    ),
  );
  const rows = [
    ["median ED", "median_expodistance", 3],
    ["mean rate per layer", "mean_rate", 4],
    ["of which attention", "attn_share", 4],
    ["of which MLP", "mlp_share", 4],
    ["mean slope per layer", "mean_slope", 4],
    ["mean R²", "mean_r_squared", 3],
  ];
  part("growth").append(
    tlc.table(
      ["over all tokens", fresh ? "trained" : "", ...(fresh ? ["fresh"] : [])],
      rows.map(([text, name, digits]) => [text, ...[data, fresh].filter(Boolean).map((of) => number(of.growth[name], digits))]),
    ),
  );
};
