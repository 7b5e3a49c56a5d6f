"""The figures of `compiler.numerics` against values worked out by hand: which rows are cut, which errors count, what a
figure is in units of, where the worst is said to be, and what is held against a limit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compiler.config import DEFAULT_LIMITS, Limits
from compiler.numerics import Array, Case, Pair, compare, cosine, judge, noise, rows
from compiler.types import Tensor

HIDDEN = Tensor("last_hidden_state", "float32", ("batch", "sequence", 2))
LOGITS = Tensor("logits", "float32", ("batch", "sequence", 3))
STARTS = Tensor("start_logits", "float32", ("batch", "sequence"))
POOLED = Tensor("pooler_output", "float32", ("batch", 2))
SCORE = Tensor("logits", "float32", ("batch", 1))


def case(mask: list[list[int]], name: str = "right padding", counts: dict[str, list[bool]] | None = None) -> Case:
    ids = np.ones((len(mask), len(mask[0])), dtype=np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.array(mask, dtype=np.int64)}
    return Case(name, inputs, {key: np.array(value) for key, value in (counts or {}).items()})


def figures(
    reference: Any, actual: Any, tensor: Tensor, sample: Case, *, logits: bool = False, keep: int | None = None
) -> dict[str, Any]:
    pair = Pair(sample, *(rows(np.array(side, dtype=np.float32), tensor, sample, keep) for side in (reference, actual)))
    return compare([pair], tensor, logits=logits)


class TestRows:
    def test_tokens_that_are_padding_are_cut(self) -> None:
        output = np.arange(12.0).reshape(2, 3, 2)
        cut = rows(output, HIDDEN, case([[1, 1, 0], [0, 1, 1]]))
        assert cut.values.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
        assert cut.index == [(0, 0), (0, 1), (1, 1), (1, 2)]
        assert cut.real.all()

    def test_one_number_a_token_is_a_row_a_text(self) -> None:
        cut = rows(np.arange(6.0).reshape(2, 3), STARTS, case([[1, 1, 0], [0, 1, 1]]))
        assert cut.values.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert cut.index == [(0,), (1,)]
        assert cut.real.tolist() == [[True, True, False], [False, True, True]]

    def test_pooled_is_a_row_a_text(self) -> None:
        cut = rows(np.array([[1.0, 2.0], [3.0, 4.0]]), POOLED, case([[1, 0], [1, 1]]))
        assert cut.values.tolist() == [[1, 2], [3, 4]]
        assert cut.index == [(0,), (1,)]

    def test_frames_that_are_padding_are_cut(self) -> None:
        sample = Case("sounds", {"input_values": np.zeros((2, 9))}, real={"frames": np.array([[True, True], [True, False]])})
        tensor = Tensor("logits", "float32", ("batch", "frames", 2))
        cut = rows(np.arange(8.0).reshape(2, 2, 2), tensor, sample)
        assert cut.values.tolist() == [[0, 1], [2, 3], [4, 5]]
        assert cut.index == [(0, 0), (0, 1), (1, 0)]

    def test_without_a_mask_every_frame_and_patch_is_a_row(self) -> None:
        sample = Case("sounds", {"input_values": np.zeros((2, 9))})
        for axis in ("frames", 2):
            cut = rows(np.arange(8.0).reshape(2, 2, 2), Tensor("logits", "float32", ("batch", axis, 2)), sample)
            assert cut.values.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_a_feature_map_is_a_row_an_image(self) -> None:
        sample = Case("images", {"pixel_values": np.zeros((2, 3, 4, 4))})
        tensor = Tensor("last_hidden_state", "float32", ("batch", 1, "feature_height", "feature_width"))
        assert rows(np.arange(8.0).reshape(2, 1, 2, 2), tensor, sample).values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_images_beside_texts(self) -> None:
        """Texts are as many as they are, whatever the batch of images; each image's scores are a row, and each text's."""
        inputs = {"input_ids": np.zeros((3, 5)), "pixel_values": np.zeros((2, 3, 4, 4)), "attention_mask": np.ones((3, 5))}
        scores = np.arange(6.0).reshape(2, 3)
        cut = rows(scores, Tensor("logits_per_image", "float32", ("batch", "texts")), Case("images", inputs))
        assert cut.values.tolist() == scores.tolist()
        cut = rows(scores.T, Tensor("logits_per_text", "float32", ("texts", "batch")), Case("images", inputs))
        assert cut.values.tolist() == scores.T.tolist()

    def test_counts_leave_rows_out(self) -> None:
        sample = case([[1], [1], [1]], counts={"pooler_output": [True, False, True]})
        cut = rows(np.arange(6.0).reshape(3, 2), POOLED, sample)
        assert cut.values.tolist() == [[0, 1], [4, 5]]
        assert cut.index == [(0,), (2,)]

    def test_counts_of_one_output_do_not_touch_another(self) -> None:
        sample = case([[1], [1]], counts={"other": [False, False]})
        assert len(rows(np.zeros((2, 2)), POOLED, sample).values) == 2

    def test_rows_of_more_axes_are_laid_flat(self) -> None:
        tensor = Tensor("maps", "float32", ("batch", 1, 2, 2))
        assert rows(np.arange(4.0).reshape(1, 1, 2, 2), tensor, case([[1]])).values.tolist() == [[0, 1, 2, 3]]

    def test_several_vectors_of_a_text_are_a_row_each(self) -> None:
        tensor = Tensor("heads", "float32", ("batch", 2, 2))
        sample = case([[1], [1]], counts={"heads": [False, True]})
        cut = rows(np.arange(8.0).reshape(2, 2, 2), tensor, sample)
        assert cut.values.tolist() == [[4, 5], [6, 7]]
        assert cut.index == [(1, 0), (1, 1)]

    def test_an_output_without_batch_is_one_row(self) -> None:
        cut = rows(np.array([1.0, 2.0]), Tensor("bias", "float32", (2,)), case([[1, 1]]))
        assert cut.values.tolist() == [[1, 2]]
        assert cut.index == [()]

    @pytest.mark.parametrize(
        ("keep", "kept"),
        [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))],
    )
    def test_keep_spreads_over_the_real_rows(self, keep: int, kept: list[int]) -> None:
        tensor = Tensor("logits", "float32", ("batch", "sequence", 1))
        cut = rows(np.arange(12.0).reshape(1, 12, 1), tensor, case([[1] * 10 + [0] * 2]), keep)
        assert cut.values[:, 0].tolist() == kept
        assert cut.index == [(0, number) for number in kept]


class TestCompare:
    def test_max_abs_is_in_units_of_the_largest_reference(self) -> None:
        found = figures([[[8.0, 0.0]]], [[[8.0, 2.0]]], HIDDEN, case([[1]]))
        assert found["scale"] == 8
        assert found["figures"]["max_abs"] == 0.25

    def test_a_scale_below_one_is_one(self) -> None:
        found = figures([[[0.5, 0.25]]], [[[0.5, 0.5]]], HIDDEN, case([[1]]))
        assert found["scale"] == 1
        assert found["figures"]["max_abs"] == 0.25

    def test_the_scale_is_taken_over_all_samples(self) -> None:
        sample = case([[1]])
        cuts = [rows(np.array([[values]]), HIDDEN, sample) for values in ((16.0, 0.0), (1.0, 0.0), (1.0, 4.0))]
        found = compare([Pair(sample, cuts[0], cuts[0]), Pair(sample, cuts[1], cuts[2])], HIDDEN, logits=False)
        assert found["scale"] == 16
        assert found["figures"]["max_abs"] == 0.25

    def test_padding_does_not_set_the_scale(self) -> None:
        assert figures([[2.0, 1000.0]], [[2.0, 1000.0]], STARTS, case([[1, 0]]))["scale"] == 2

    def test_max_rel_is_relative_to_each_number(self) -> None:
        assert figures([[[4.0, 0.5]]], [[[4.0, 0.75]]], HIDDEN, case([[1]]))["figures"]["max_rel"] == 0.5

    def test_max_rel_has_a_floor_of_a_thousandth_of_the_scale(self) -> None:
        found = figures([[[4.0, 0.0]]], [[[4.0, 0.001]]], HIDDEN, case([[1]]))
        assert found["figures"]["max_rel"] == pytest.approx(0.001 / 0.004)

    def test_cosine_is_the_smallest_of_a_row(self) -> None:
        found = figures([[[1.0, 0.0], [1.0, 0.0]]], [[[2.0, 0.0], [1.0, 1.0]]], HIDDEN, case([[1, 1]]))
        assert found["figures"]["cosine"] == pytest.approx(math.sqrt(0.5))
        assert found["worst"]["cosine"] == "sample 'right padding' (1x2), output last_hidden_state[0, 1]"

    @pytest.mark.parametrize(("position", "counts"), [(1, True), (2, False)])
    def test_only_errors_at_real_tokens_count(self, position: int, counts: bool) -> None:
        actual = np.ones((1, 3, 2))
        actual[0, position, 0] = -5
        found = figures(np.ones((1, 3, 2)), actual, HIDDEN, case([[1, 1, 0]]))["figures"]
        assert (found["max_abs"] > 0, found["max_rel"] > 0, found["cosine"] < 0.9) == (counts, counts, counts)

    @pytest.mark.parametrize(("position", "counts"), [(1, True), (2, False)])
    def test_only_errors_at_real_tokens_count_in_question_answering(self, position: int, counts: bool) -> None:
        actual = np.array([[3.0, 2.0, 9.0]])
        actual[0, position] = 50
        found = figures([[3.0, 2.0, 9.0]], actual, STARTS, case([[1, 1, 0]]), logits=True)["figures"]
        assert found == (
            {"max_abs": 16, "max_rel": 24, "cosine": pytest.approx(109 / math.sqrt(13 * 2509)), "argmax": 0}
            if counts
            else {"max_abs": 0, "max_rel": 0, "cosine": pytest.approx(1), "argmax": 1}
        )

    def test_argmax_is_the_share_of_rows(self) -> None:
        reference = [[[3, 1, 0], [0, 1, 2], [5, 4, 3], [1, 2, 1]]]
        actual = [[[2, 1, 0], [0, 3, 2], [5, 4, 3], [1, 2, 1]]]
        found = figures(reference, actual, LOGITS, case([[1, 1, 1, 1]]), logits=True)
        assert found["figures"]["argmax"] == 0.75
        assert found["worst"]["argmax"] == "sample 'right padding' (1x4), output logits[0, 1]"

    def test_argmax_of_question_answering_looks_past_padding(self) -> None:
        found = figures([[1, 2, 99], [4, 3, 99]], [[1, 2, 0], [3, 4, 0]], STARTS, case([[1, 1, 0]] * 2), logits=True)
        assert found["figures"]["argmax"] == 0.5
        assert found["worst"]["argmax"] == "sample 'right padding' (2x3), output start_logits[1]"

    def test_hidden_states_have_no_argmax(self) -> None:
        assert set(figures([[[1, 2]]], [[[1, 2]]], HIDDEN, case([[1]]))["figures"]) == {"max_abs", "max_rel", "cosine"}

    def test_pooled_rows_that_do_not_count(self) -> None:
        sample = case([[1], [1]], counts={"pooler_output": [True, False]})
        found = figures([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [-30.0, 0.0]], POOLED, sample)
        assert found["figures"] == {"max_abs": 0, "max_rel": 0, "cosine": pytest.approx(1)}
        assert found["scale"] == 2

    def test_a_sample_without_a_row_that_counts_is_passed_over(self) -> None:
        none = case([[1]], "left padding", {"pooler_output": [False]})
        some = case([[1]], "right padding")
        output, wrong = np.array([[1.0, 0.0]]), np.array([[7.0, 7.0]])
        pairs = [
            Pair(none, rows(output, POOLED, none), rows(wrong, POOLED, none)),
            Pair(some, rows(output, POOLED, some), rows(output, POOLED, some)),
        ]
        assert compare(pairs, POOLED, logits=False)["figures"] == {"max_abs": 0, "max_rel": 0, "cosine": 1}

    def test_single_numbers_have_one_cosine_together(self) -> None:
        sample = case([[1], [1]])
        found = figures([[3.0], [4.0]], [[4.0], [3.0]], SCORE, sample, logits=True)
        assert found["figures"]["cosine"] == pytest.approx(24 / 25)
        assert found["figures"]["max_abs"] == 0.25
        assert "argmax" not in found["figures"]
        assert found["worst"]["cosine"] == "logits: all samples together"

    def test_single_numbers_of_many_samples_make_one_vector(self) -> None:
        sample = case([[1]])
        cuts = {value: rows(np.array([[value]]), SCORE, sample) for value in (3.0, 4.0)}
        pairs = [Pair(sample, cuts[3.0], cuts[4.0]), Pair(sample, cuts[4.0], cuts[3.0])]
        assert compare(pairs, SCORE, logits=True)["figures"]["cosine"] == pytest.approx(24 / 25)

    def test_a_negated_single_number_shows(self) -> None:
        assert figures([[3.0], [4.0]], [[-3.0], [-4.0]], SCORE, case([[1], [1]]))["figures"]["cosine"] == -1

    def test_keep_compares_the_kept_rows_alone(self) -> None:
        actual = np.ones((1, 5, 2))
        actual[0, 1] = 9  # of 5 rows, 3 are kept: 0, 2 and 4
        sample = case([[1] * 5])
        assert figures(np.ones((1, 5, 2)), actual, HIDDEN, sample, keep=3)["figures"]["max_abs"] == 0
        assert figures(np.ones((1, 5, 2)), actual, HIDDEN, sample)["figures"]["max_abs"] == 8

    def test_the_worst_names_sample_shape_output_and_index(self) -> None:
        output = np.ones((2, 3, 2))
        actual = output.copy()
        actual[1, 2, 1] = 3
        actual[0, 0, 0] = 2
        found = figures(output, actual, HIDDEN, case([[1, 1, 0], [0, 1, 1]], "left padding"))
        place = "sample 'left padding' (2x3), output last_hidden_state[1, 2, 1]"
        assert (found["worst"]["max_abs"], found["worst"]["max_rel"]) == (place, place)

    def test_the_worst_of_pooled_names_the_text_of_rows_that_count(self) -> None:
        sample = case([[1], [1]], counts={"pooler_output": [False, True]})
        found = figures([[0.0, 0.0], [1.0, 1.0]], [[9.0, 9.0], [1.0, 2.0]], POOLED, sample)
        assert found["worst"]["max_abs"] == "sample 'right padding' (2x1), output pooler_output[1, 1]"

    def test_the_worst_of_question_answering_names_the_token(self) -> None:
        found = figures([[1.0, 1.0, 1.0]], [[1.0, 4.0, 1.0]], STARTS, case([[1, 1, 0]]))
        assert found["worst"]["max_abs"] == "sample 'right padding' (1x3), output start_logits[0, 1]"

    def test_the_worst_is_found_in_the_sample_that_has_it(self) -> None:
        good, bad = case([[1]], "no padding"), case([[1, 1]], "text")
        ones = np.ones((1, 2, 2))
        pairs = [
            Pair(good, rows(ones[:, :1], HIDDEN, good), rows(ones[:, :1], HIDDEN, good)),
            Pair(bad, rows(ones, HIDDEN, bad), rows(ones * 2, HIDDEN, bad)),
        ]
        assert "sample 'text' (1x2)" in compare(pairs, HIDDEN, logits=False)["worst"]["max_abs"]


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_it_fails_any_limit(self, value: float, precision: str) -> None:
        found = figures([[[1, 2, 3], [1, 2, 3]]], [[[1, 2, 3], [1, value, 3]]], LOGITS, case([[1, 1]]), logits=True)
        loosest = Limits(max_abs=1e300, cosine=0.0, argmax=1e-9)
        for limits in (loosest, DEFAULT_LIMITS[precision]):
            checks = judge({"logits": found}, limits)
            assert checks
            assert not any(check.passed for check in checks)
        assert found["worst"]["max_abs"].startswith("sample 'right padding' (1x2), output logits[0, 1, 1]")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_at_padding_it_does_not_count(self, value: float) -> None:
        found = figures([[[1, 2], [1, 2]]], [[[1, 2], [value, 2]]], HIDDEN, case([[1, 0]]))
        assert found["figures"]["max_abs"] == 0
        assert figures([[1, 2]], [[1, value]], STARTS, case([[1, 0]]), logits=True)["figures"]["max_abs"] == 0

    def test_json_can_hold_the_figures(self) -> None:
        found = figures([[[1, 2]]], [[[1, math.nan]]], HIDDEN, case([[1]]))
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_an_infinite_single_number(self) -> None:
        found = figures([[1.0]], [[math.inf]], SCORE, case([[1]]), logits=True)
        assert not any(check.passed for check in judge({"logits": found}, DEFAULT_LIMITS["fp32"]))

    def test_a_huge_finite_value_stays_json(self) -> None:
        found = figures([[[1, 2]]], [[[1, 3e38]]], HIDDEN, case([[1]]))
        json.dumps(found, allow_nan=False)
        assert not judge({"x": found}, DEFAULT_LIMITS["fp32"])[0].passed


class TestCosine:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([1, 0], [1, 0], 1),
            ([1, 0], [0, 1], 0),
            ([1, 0], [-2, 0], -1),
            ([3, 4], [4, 3], 0.96),
            ([0, 0], [0, 0], 1),
            ([0, 0], [1, 0], 0),
            ([1, 0], [0, 0], 0),
        ],
    )
    def test_by_hand(self, a: list[float], b: list[float], expected: float) -> None:
        assert cosine(np.array([a], dtype=float), np.array([b], dtype=float))[0] == pytest.approx(expected)

    def test_each_row_has_its_own(self) -> None:
        a, b = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 3.0]])
        assert cosine(a, b).tolist() == [0, 1]

    def test_tiny_and_large_rows(self) -> None:
        a = np.array([[1e-30, 0.0], [1e30, 1e30]])
        assert cosine(a, a) == pytest.approx([1, 1])


FINITE = st.floats(-1e6, 1e6, width=32)


@st.composite
def two_arrays(draw: st.DrawFn) -> tuple[Array, Array]:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    strategy = arrays.arrays(np.float64, shape, elements=FINITE)
    return draw(strategy), draw(strategy)


@given(two_arrays())
def test_a_cosine_lies_between_minus_one_and_one(pair: tuple[Array, Array]) -> None:
    found = cosine(*pair)
    assert found.shape == (len(pair[0]),)
    assert ((found >= -1) & (found <= 1)).all()


@given(arrays.arrays(np.float64, (2, 3, 2), elements=FINITE), st.booleans())
def test_the_same_output_has_no_error(output: Array, logits: bool) -> None:
    sample = case([[1, 1, 0], [0, 1, 1]])
    cut = rows(output, HIDDEN, sample)
    found = compare([Pair(sample, cut, cut)], HIDDEN, logits=logits)["figures"]
    assert (found["max_abs"], found["max_rel"]) == (0, 0)
    assert found["cosine"] == pytest.approx(1)
    assert found.get("argmax", 1) == 1


@given(two_arrays())
def test_figures_are_json_and_in_their_ranges(pair: tuple[Array, Array]) -> None:
    sample = case([[1]] * len(pair[0]))
    tensor = Tensor("logits", "float32", ("batch", pair[0].shape[1]))
    sides = [rows(side, tensor, sample) for side in pair]
    found = compare([Pair(sample, *sides)], tensor, logits=True)
    json.dumps(found, allow_nan=False)
    assert found["figures"]["max_abs"] >= 0
    assert -1 <= found["figures"]["cosine"] <= 1
    assert 0 <= found["figures"].get("argmax", 0) <= 1
    assert all(found["worst"].values())


class TestJudge:
    def result(self, **values: float) -> dict[str, Any]:
        return {"figures": values, "worst": {name: f"at {name}" for name in values}}

    def test_each_figure_against_its_limit(self) -> None:
        outputs = {"a": self.result(max_abs=0.2, cosine=0.9, argmax=0.5), "b": self.result(max_abs=0.05, cosine=0.99)}
        checks = judge(outputs, Limits(max_abs=0.1, cosine=0.95, argmax=0.5))
        assert {(check.output, check.name): check.passed for check in checks} == {
            ("a", "max_abs"): False,
            ("a", "cosine"): False,
            ("a", "argmax"): True,
            ("b", "max_abs"): True,
            ("b", "cosine"): True,
        }
        assert checks[0].worst == "at max_abs"
        assert (checks[0].figure, checks[0].limit) == (0.2, 0.1)

    @pytest.mark.parametrize(("name", "limit"), [("max_abs", 0.1), ("cosine", 0.9), ("argmax", 0.9)])
    def test_the_limit_itself_passes(self, name: str, limit: float) -> None:
        assert judge({"a": self.result(**{name: limit})}, Limits(**{name: limit}))[0].passed

    def test_no_limit_is_no_check(self) -> None:
        assert judge({"a": self.result(max_abs=9, max_rel=9, cosine=-1)}, Limits()) == ()

    def test_nothing_to_compare_does_not_pass_unseen(self) -> None:
        """Without one row that counts there is no evidence; the figures must not be perfect ones."""
        sample = case([[1]], counts={"pooler_output": [False]})
        found = figures([[1.0, 2.0]], [[9.0, 9.0]], POOLED, sample)
        assert not all(check.passed for check in judge({"pooler_output": found}, DEFAULT_LIMITS["fp32"]))


def test_noise_is_told_for_each_kind_of_sample() -> None:
    """In units of an output's variance; answers of another text make it 2 or so, however many other samples are right, and
    however much larger they are."""
    tensor = Tensor("last_hidden_state", "float32", ("batch", "sequence", 4))
    generator = np.random.default_rng(3)

    def pair(name: str, error: float, *, swapped: bool = False, length: int = 30) -> Pair:
        inputs = {"input_ids": np.ones((4, length)), "attention_mask": np.ones((4, length))}
        case = Case(name, inputs)
        before = generator.standard_normal((4, length, 4))
        before[..., 3] += 40  # a column that is wide and hardly varies
        after = before[::-1] if swapped else before + error * generator.standard_normal(before.shape)
        return Pair(case, rows(before, tensor, case), rows(after, tensor, case))

    right = [pair("no padding", 0.1), pair("left padding", 0.1)]
    share, where = noise(right, tensor)
    assert share == pytest.approx(0.01, rel=0.3)
    assert re.fullmatch("last_hidden_state: samples with (no|left) padding, 4x30", where)
    wrong, where = noise([*right, *([pair("no padding", 0.0)] * 3), pair("right padding", 0.0, swapped=True)], tensor)
    assert wrong == pytest.approx(2, rel=0.3)
    assert where == "last_hidden_state: samples with right padding, 4x30"
    wrong, where = noise([*right, pair("no padding", 0.1, length=300), pair("no padding", 0, swapped=True, length=5)], tensor)
    assert wrong == pytest.approx(2, rel=0.5)
    assert where == "last_hidden_state: samples with no padding, 4x5"
    bad = pair("left padding", 0.0)
    bad.actual.values[3, 1] = np.nan
    assert noise([*right, bad], tensor)[0] == 1e308
    assert noise([], tensor)[0] == 1e308


def test_noise_of_a_number_a_token() -> None:
    """All tokens are one column, whatever the lengths are: a batch of one text has noise as any other."""
    tensor = Tensor("start_logits", "float32", ("batch", "sequence"))
    generator = np.random.default_rng(4)
    pairs = []
    for batch, length in ((1, 8), (1, 16), (1, 17), (2, 9)):
        mask = np.ones((batch, length))
        mask[-1, -3:] = 0
        case = Case("right padding", {"input_ids": mask, "attention_mask": mask})
        before = 5 + 2 * generator.standard_normal((batch, length))
        after = before + 0.2 * generator.standard_normal(before.shape)
        after[mask == 0] = np.nan  # nobody's result
        pairs.append(Pair(case, rows(before, tensor, case), rows(after, tensor, case)))
    share, _ = noise(pairs, tensor)
    assert share == pytest.approx(0.01, rel=1)
    other_sign = replace(pairs[0], actual=replace(pairs[0].actual, values=-pairs[0].actual.values))
    assert noise([*pairs[1:], other_sign], tensor)[0] > 5
