"""Plausible slips in single lines of the sources, each of which a test must notice; ``mutants.py`` tries them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Break(NamedTuple):
    """One slip.

    Attributes:
        slip: what is wrong, in a few words.
        file: the source file, from the root of the repository.
        old: the text to replace; it stands once in the file.
        new: what replaces it.
        tests: test files, or single tests of a long file, that should notice.
    """

    slip: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def stale(self, root: Path) -> str | None:
        """Return why the break no longer fits the sources and tests, or None if it does."""
        path = root / self.file
        if not path.is_file() or path.read_text(encoding="utf-8").count(self.old) != 1:
            return f"{self.file} does not hold {self.old!r} exactly once"
        for test in self.tests:
            file, _, name = test.partition("::")
            if not (root / file).is_file() or f"def {name}" not in (root / file).read_text(encoding="utf-8"):
                return f"there is no test {test}"
        return None


def _slip(slip: str, module: str, old: str, new: str, *tests: str) -> Break:
    files = (f"tests/{test.replace('::', '.py::')}" if "::" in test else f"tests/{test}.py" for test in tests)
    return Break(slip, f"tlcoupling/{module}.py", old, new, tuple(files))


BREAKS = (
    _slip(
        "dropped abs of the projected Jacobian",
        "coupling/metric",
        "aligned = projected.abs() if absolute else projected",
        "aligned = projected",
        "coupling/test_metric",
    ),
    _slip(
        "wrong normaliser: the trace as a mean",
        "coupling/metric",
        'if normalizer == "frobenius" else s1.sum(-1)',
        'if normalizer == "frobenius" else s1.mean(-1)',
        "coupling/test_metric",
    ),
    _slip(
        "the null's K outside the square",
        "coupling/null",
        "mean = (k / d) ** 2 + squares",
        "mean = k / d**2 + squares",
        "coupling/test_null",
    ),
    _slip(
        "a factor of two lost in the null's spread",
        "coupling/null",
        "with_size = 2 * k * r",
        "with_size = k * r",
        "coupling/test_null",
    ),
    _slip(
        "the null without its second order",
        "coupling/null",
        "root = mean.sqrt() * (1 - variance / (8 * mean.square()))",
        "root = mean.sqrt()",
        "coupling/test_null",
    ),
    _slip(
        "a test in which a pair and its reverse have bases of their own",
        "coupling/chance",
        "back if shared else blocks[2:]",
        "(second, first)",
        "coupling/test_chance",
    ),
    _slip(
        "the mean includes the diagonal",
        "coupling/metric",
        "return matrix[..., mask].mean(-1)",
        "return matrix.flatten(-2).mean(-1)",
        "coupling/test_metric",
    ),
    _slip(
        "the profile reads one triangle twice",
        "coupling/result",
        "matrix.diagonal(-step, -2, -1)",
        "matrix.diagonal(step, -2, -1)",
        "coupling/test_depth::test_summaries_leave_the_diagonal_out",
    ),
    _slip(
        "off by one: the fixed src itself is out of reach",
        "coupling/context",
        "reach[held:] if",
        "reach[held + 1 :] if",
        "coupling/test_token::test_context_coupling_is_the_formula",
    ),
    _slip(
        "the departure from normality does not know the eigenvalues",
        "dynamics/geometry",
        "(s.square().sum() - eigenvalues.abs().square().sum())",
        "s.square().sum()",
        "dynamics/test_geometry::test_each_quantity_is_its_definition",
    ),
    _slip(
        "a basis is carried back through the factors in the wrong order",
        "dynamics/lyapunov",
        "in reversed(factors)]",
        "in factors]",
        "dynamics/test_lyapunov::test_exponents_hold_where_the_product_underflows",
    ),
    _slip(
        "linearity is fitted without an offset",
        "dynamics/depth_profile",
        "each.double() - each.double().mean(0)",
        "each.double()",
        "dynamics/test_depth_profile::test_linearity_is_the_published_score",
    ),
    _slip(
        "the bases of another layer are those of the layer itself",
        "coupling/groups",
        "for which in both))",
        "for which in both[:1] * 2))",
        "coupling/test_token::test_context_coupling_is_the_formula",
    ),
    _slip(
        "Jacobians are kept to the end",
        "coupling/groups",
        "[last].dropped.append(place)",
        "[order[-1]].dropped.append(place)",
        "coupling/test_groups",
    ),
    _slip(
        "later threads keep a worker's thread count",
        "coupling/workers",
        "self._stack.callback(torch.set_num_threads, self._threads)",
        "pass",
        "coupling/test_workers",
    ),
    _slip(
        "work for the calling thread alone runs in threads",
        "coupling/workers",
        "if self._pool is None or not at_once:",
        "if self._pool is None:",
        "coupling/test_workers",
    ),
    _slip(
        "wrong tolerance of the certificate",
        "jacobian/certificate",
        "TOLERANCE = 1e-4",
        "TOLERANCE = 1e-1",
        "jacobian/test_engine::test_auto_falls_back_and_says_so_once_when_the_closed_form_is_wrong",
    ),
    _slip(
        "the provenance names the closed form for autograd's numbers",
        "jacobian/engine",
        '["autograd" if made is None else "analytic"]',
        '["analytic"]',
        "forward/test_user_hooks::test_only_hooked_blocks_leave_the_closed_form",
    ),
    _slip(
        "a jump of the quotients passes for a kink",
        "jacobian/differences",
        "good &= agree(quotients(low), quotients(high), rounding[:, None] / low)",
        "pass",
        "jacobian/test_differences::test_no_staircase_passes_for_a_kink",
    ),
    _slip(
        "a held Jacobian compares the names of weights alone",
        "jacobian/held",
        "or not then.equal(now[name])",
        "",
        "jacobian/test_held",
    ),
    _slip(
        "a branch of the composition without its own norm",
        "jacobian/readings",
        "made if self.norm is None else self.norm.derivative(pos) @ made",
        "made",
        "jacobian/test_engine::test_norms_of_queries_and_keys_are_read_in_float32",
    ),
    _slip(
        "a router that is constant",
        "jacobian/formula",
        "if mixing is not None:",
        "if mixing is None:",
        "jacobian/test_mixture",
    ),
    _slip(
        "experts that are not weighted",
        "jacobian/mixture",
        "[weight * slope for slope in experts.parts(own)]",
        "[slope for slope in experts.parts(own)]",
        "jacobian/test_mixture",
    ),
    _slip(
        "a gate that is constant",
        "jacobian/attention",
        "(z * opened * (1 - opened)).diag_embed()",
        "(0 * z).diag_embed()",
        "jacobian/test_engine::test_the_engines_agree_in_float64",
    ),
    _slip(
        "a graph that was let go is taken for none",
        "jacobian/runs",
        "if not self._graph.points:",
        "if self._graph is None:",
        "jacobian/test_engine::test_a_graph_that_was_let_go_is_made_again_where_more_is_asked_for",
    ),
    _slip(
        "layers whose checks are small are made one by one",
        "coupling/pairs",
        "place.layer if by_layer else None",
        "place.layer",
        "coupling/test_pairs::test_layers_are_made_together_where_their_checks_are_small",
    ),
    _slip(
        "the skip connection passes between positions",
        "jacobian/formula",
        "BlockMap(attn, *mlp, skip=same)",
        "BlockMap(attn, *mlp, skip=True)",
        "jacobian/test_engine::test_the_engines_agree_in_float64",
    ),
    _slip(
        "lost orthonormality does not count as residual",
        "linalg/krylov",
        "top_u, s, top_v).maximum(skew * s[..., :1])",
        "top_u, s, top_v)",
        "linalg/test_svd",
    ),
    _slip(
        "an early end of the iteration",
        "linalg/krylov",
        "if far <= 1:",
        "if far <= 100:",
        "linalg/test_svd",
    ),
    _slip(
        "the residual looks at one side",
        "linalg/triplets",
        "return (jv - u * across).norm(dim=-2).maximum((jtu - v * across).norm(dim=-2))",
        "return (jv - u * across).norm(dim=-2)",
        "linalg/test_svd",
    ),
    _slip(
        "wrong tolerance of the numerical rank",
        "linalg/svd",
        "floor = triplets.s[0] * max(operator.shape) * torch",
        "floor = triplets.s[0] * torch",
        "linalg/test_svd",
    ),
    _slip(
        "off by one: a prompt may not fill the context",
        "forward/prompt",
        "if context and tokens.shape[1] > context:",
        "if context and tokens.shape[1] >= context:",
        "forward/test_trace::test_a_prompt_may_fill_the_context",
    ),
    _slip(
        "wrong tolerance of the residual identity",
        "forward/stream",
        "torch.float32: 1e-4,",
        "torch.float32: 1e-2,",
        "forward/test_trace::test_writes_may_miss_the_stream_by_its_rounding",
    ),
    _slip(
        "dropped check of what the MLP reads",
        "forward/stream",
        "stream._check_reads(part, rows(reads), IDENTITY_TOLERANCE[first.dtype])",
        "pass",
        "forward/test_trace::test_writes_that_are_not_finite_name_their_block",
    ),
    _slip(
        "sign of the hooks' edits",
        "forward/stream",
        "edits = resid[1:] - stack(",
        "edits = stack(",
        "forward/test_user_hooks::test_edits_of_the_stream_belong_to_no_sublayer",
    ),
    _slip(
        "a short row's rounding counts in full",
        "forward/stream",
        "gap / truth.norm(dim=-1).clamp_min(shortest)",
        "gap / truth.norm(dim=-1)",
        "forward/test_trace::test_a_short_row_counts_as_long_as_the_shortest_that_is_allowed",
    ),
    _slip(
        "a cache may differ at single positions",
        "forward/trace",
        "gaps.median() <= allowed and gaps.max() <= 10 * allowed",
        "gaps.median() <= allowed",
        "forward/test_trace::test_a_cache_is_held_against_the_model_at_each_position",
    ),
    _slip(
        "a model counts as causal unless its configuration says otherwise",
        "forward/trace",
        "if (relative_gap(there, here) > _CAUSAL).any():",
        "if (relative_gap(there, here) > 1e9).any():",
        "forward/test_split::test_any_pair_of_a_bidirectional_model_has_a_jacobian",
    ),
    _slip(
        "a stream that changes between blocks is measured as if it did not",
        "forward/hooked",
        "if not gap <= _BETWEEN:",
        "if gap > 2:",
        "forward/test_split::test_a_stream_that_changes_between_blocks_is_refused",
    ),
    _slip(
        "a slot holds what its name says",
        "forward/split",
        'return "attn" if slot == "attn" or _attends(module) else "mlp"',
        'return "attn" if slot == "attn" else "mlp"',
        "forward/test_split::test_what_a_slot_holds_is_told_by_its_module",
    ),
    _slip(
        "hooks edit the stream of the trace in place",
        "forward/trace",
        "given = resid_pre.clone()",
        "given = resid_pre",
        "forward/test_user_hooks::test_forward_pass_and_jacobians_see_the_hooks",
    ),
    _slip(
        "wrong hook point: the next block's reading is left out",
        "forward/trace",
        "return out if after is None else after(out)",
        "return out",
        "forward/test_user_hooks::test_forward_pass_and_jacobians_see_the_hooks",
    ),
    _slip(
        "a hook on a block's input counts as the block's own",
        "forward/user_hooks",
        "any(point is not reads for point in points_of_block(touched, layer))",
        "any(points_of_block(touched, layer))",
        "forward/test_user_hooks::test_only_hooked_blocks_leave_the_closed_form",
    ),
    _slip(
        "hooks registered on modules outside the blocks are overlooked",
        "forward/user_hooks",
        "has_module_hooks(each for part in modules for each in part.modules())",
        "False",
        "forward/test_user_hooks::test_hooks_outside_the_blocks_are_told",
    ),
    _slip(
        "dropped check that a result is that of its cell",
        "sweeps/store",
        "return measured is not None and measured.cell.key == cell.key",
        "return measured is not None",
        "sweeps/test_store",
    ),
    _slip(
        "another store's failure replaces ours",
        "sweeps/store",
        "if key not in known and self._measured(key) is None:",
        "if self._measured(key) is None:",
        "sweeps/test_store",
    ),
    _slip(
        "keys without the version of the measurement",
        "sweeps/cells",
        'return digest_of({"measurement": MEASUREMENT, **self.to_json()})',
        "return digest_of(self.to_json())",
        "sweeps/test_cells",
    ),
    _slip(
        "keys lack the settings other than K",
        "sweeps/cells",
        'return digest_of({"measurement": MEASUREMENT, **self.to_json()})',
        'return digest_of({"measurement": MEASUREMENT, **self.to_json(), "settings": self.settings.k})',
        "sweeps/test_cells",
    ),
    _slip(
        "wrong tolerance of agreement: bfloat16 weights pass",
        "sweeps/agreement",
        "TOLERANCE = 1e-4",
        "TOLERANCE = 1e-2",
        "sweeps/test_agreement",
    ),
    _slip(
        "numbers near zero are compared relatively",
        "sweeps/agreement",
        "_SMALL = 0.01",
        "_SMALL = 0.0",
        "sweeps/test_agreement",
    ),
    _slip(
        "NaN agrees with a number",
        "sweeps/agreement",
        "one.shape != two.shape or not torch.equal(one.isfinite(), two.isfinite())",
        "one.shape != two.shape",
        "sweeps/test_agreement",
    ),
    _slip(
        "a share of variance that is not squared",
        "scores/correlate",
        "partial_correlation(x, null).r ** 2",
        "partial_correlation(x, null).r",
        "scores/test_correlate::test_the_published_points_give_the_figures_r_squared_and_what_width_explains",
    ),
    _slip(
        "one degree of freedom too few",
        "scores/partial_correlation",
        "freedom = size - basis.shape[1] - 1",
        "freedom = size - basis.shape[1] - 2",
        "scores/test_partial_correlation",
    ),
    _slip(
        "dropped abs in the p-value",
        "scores/partial_correlation",
        "t.sf(abs(r) * np",
        "t.sf(r * np",
        "scores/test_partial_correlation",
    ),
    _slip(
        "skewness is not corrected",
        "results/intervals",
        "a = value - k / (6 * n)",
        "a = value + k / (6 * n)",
        "results/test_intervals",
    ),
    _slip(
        "rows of a cluster count as independent",
        "scores/correlate",
        "independent = len(set(clusters)) == len(clusters)",
        "independent = True",
        "scores/test_correlate",
    ),
    _slip(
        "the file is renamed before it is on the disk",
        "results/atomic",
        "        _to_disk(temporary, os.O_RDWR)\n        temporary.chmod(0o644)\n        os.replace(temporary, path)",
        "        temporary.chmod(0o644)\n        os.replace(temporary, path)\n        _to_disk(path, os.O_RDWR)",
        "results/test_atomic",
    ),
    _slip(
        "a file that only its writer can read",
        "results/atomic",
        "        temporary.chmod(0o644)\n",
        "",
        "results/test_atomic",
    ),
    _slip(
        "files of a living process are removed",
        "results/atomic",
        "abandoned = age > _ABANDONED_HERE_SECONDS and not _is_alive(int(process))",
        "abandoned = age > _ABANDONED_HERE_SECONDS",
        "results/test_atomic",
    ),
    _slip(
        "the sample's variance for the population's",
        "trajectory/growth",
        "alpha.var(0, correction=0)",
        "alpha.var(0, correction=1)",
        "trajectory/test_growth",
    ),
    _slip(
        "shares of growth in the wrong order",
        "trajectory/growth",
        "(mid - log_norms[:-1]).cpu(), (after - mid).cpu()",
        "(after - mid).cpu(), (mid - log_norms[:-1]).cpu()",
        "trajectory/test_linearity",
    ),
    _slip(
        "a step of length zero is named by another layer",
        "trajectory/linearity",
        "(self.n // self._per_layer, pos)",
        "(self.n, pos)",
        "trajectory/test_linearity",
    ),
    _slip(
        "the fit runs over the layers' ranks, not their indices",
        "dynamics/spectrum",
        "depth = torch.tensor(coupling.layers, dtype=values.dtype)",
        "depth = torch.arange(len(coupling.layers), dtype=values.dtype)",
        "dynamics/test_spectrum",
    ),
    _slip(
        "the linearised system without the skip connection",
        "dynamics/linearized",
        "last + operator.mv(last)",
        "operator.mv(last)",
        "dynamics/test_linearized::test_in_a_linear_model_the_linearisation_is_exact",
    ),
    _slip(
        "the page's norms are those of the embedding",
        "viz/payload",
        "plain(growth.norms[-1])",
        "plain(growth.norms[0])",
        "viz/test_page::test_a_page_holds_the_numbers_of_its_analysis",
    ),
    _slip(
        "wrong axis: the page's growth per token, not per layer",
        "viz/payload",
        "plain(result.alpha[:, kept].nanmean(1))",
        "plain(result.alpha[:, kept].nanmean(0))",
        "viz/test_page::test_a_page_holds_the_numbers_of_its_analysis",
    ),
    _slip(
        "the summary's slope is the mean rate",
        "analysis/summary",
        "mean_slope=growth.slope.nanmean().item()",
        "mean_slope=growth.rate.nanmean().item()",
        "viz/test_page::test_summary_reduces_over_pairs_and_tokens",
    ),
    _slip(
        "means over rows, not over prompts",
        "training/means",
        "sum(numbers) / len(numbers)",
        "sum(numbers) / len(rows)",
        "training/test_monitor::test_what_is_recorded_of_a_step_is_what_analyze_measures_of_those_weights",
    ),
    _slip(
        "step and value swapped for TensorBoard",
        "training/means",
        "logger.add_scalar(name, value, step)",
        "logger.add_scalar(name, step, value)",
        "training/test_monitor::test_numbers_go_to_loggers_and_the_cost_is_printed",
    ),
    _slip(
        "the hub may be asked",
        "forward/offline",
        'patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True)',
        'patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", False)',
        "models/test_load",
    ),
    _slip(
        "a run refuses a store of other runs",
        "training/record",
        "for cell in _cells(store) if cell.model == self.name",
        "for cell in _cells(store)",
        "training/test_monitor::test_a_run_does_not_begin_where_another_of_its_name_is",
    ),
    _slip(
        "NumPy's generator is not restored",
        "models/generators",
        "np.random.set_state(arrays)",
        "pass",
        "models/test_generators",
    ),
    _slip(
        "a forecast swaps what is left and what is done",
        "cli/sweep_tables",
        "str(group.n_cells), str(group.n_kept), *costs",
        "str(group.n_kept), str(group.n_cells), *costs",
        "sweeps/test_forecast::test_a_dry_run_prints_and_writes_nothing",
    ),
    _slip(
        "minutes are printed as hours",
        "cli/sweep_tables",
        '(60.0, "min")',
        '(60.0, "h")',
        "cli/test_sweep_tables",
    ),
    _slip(
        "a report counts the kept cells as failed",
        "cli/sweep_tables",
        "[red]{len(report.failed)} failed[/]",
        "[red]{report.n_kept} failed[/]",
        "cli/test_sweep_tables",
    ),
    _slip(
        "a frozen activation is its slope instead of its factor",
        "jacobian/frozen",
        "self._mlp_slopes[0], post / read)",
        "self._mlp_slopes[0], self._mlp_slopes[0])",
        "slices/test_detached",
    ),
    _slip(
        "the null of a map between features without its root",
        "slices/features",
        "lengths / len(directions) ** 0.5",
        "lengths / len(directions)",
        "slices/test_features",
    ),
    _slip(
        "blocks that are rotated as a whole are not",
        "slices/relations",
        "(left.mT, right), strict=True",
        "(left, right), strict=True",
        "slices/test_relations",
    ),
    _slip(
        "an encoder's attention cut to its lower triangle",
        "viz/panes",
        "causal = not attention[:, :, above].any()",
        "causal = True",
        "viz/test_page::test_attention_to_later_tokens_is_kept_where_a_model_has_it",
    ),
    _slip(
        "the chance level of the baseline in the page is the model's",
        "viz/payload",
        '"baseline_chance": picture.values.get(CHANCE_OF_BASELINE)',
        '"baseline_chance": picture.chance',
        "viz/test_page::test_measures_on_request_are_in_the_page_by_sublayer_beside_chance_and_baseline",
    ),
    _slip(
        "the measures of a sublayer drawn as another's",
        "viz/shown",
        "itemgetter((sublayer, -1, slice(None), at))",
        "itemgetter((0, -1, slice(None), at))",
        "viz/test_page::test_measures_on_request_are_in_the_page_by_sublayer_beside_chance_and_baseline",
    ),
    _slip(
        "the float32 weights of all layers of a stack held at once",
        "coupling/pairs",
        "lifted = operator.device != HOST or jacobians.trace.lifts(place.layer)",
        "lifted = operator.device != HOST",
        "forward/test_quantised::test_a_measurement_holds_one_layer_in_float32_and_no_more",
    ),
    _slip(
        "one position counts alone though a hook brings others back to it",
        "forward/trace",
        "            if (gap > _CAUSAL).any():",
        "            if False:",
        "slices/test_atlas::test_one_position_is_alone_where_nothing_leads_back_to_it",
    ),
    _slip(
        "what a slice writes is compared with what blocks read",
        "slices/atlas",
        "(self.u, self.block_u)",
        "(self.u, self.block_v)",
        "slices/test_atlas::test_overlaps_are_those_of_the_subspaces",
    ),
    _slip(
        "accelerate's hooks bring weights again while they are held",
        "forward/lifting",
        "hook.offload = False",
        "hook.offload = True",
        "forward/test_offload::test_the_weights_of_one_layer_are_in_memory_at_a_time",
    ),
    _slip(
        "a slice holds the offloaded weights of all its blocks",
        "slices/flows",
        "return self._remade(layer, made) if self._offloaded(layer) else made",
        "return made",
        "forward/test_offload::test_the_weights_of_one_layer_are_in_memory_at_a_time",
    ),
    _slip(
        "the mean over destinations is a sum",
        "slices/sweep",
        ".to(trace.resid) / len(dest))",
        ".to(trace.resid))",
        "slices/test_atlas::test_singular_triplets_are_those_of_the_whole_model",
    ),
)
