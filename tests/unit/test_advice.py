"""What is advised, from figures made up to stand at each turn of the road."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autorev.advice.further import how
from autorev.analysis import Category, Recommendation
from autorev.methods import Method
from autorev.profiler.advise import advise
from autorev.profiler.readings import Memory, Round
from autorev.profiler.record import Point, Profile, Result, Status
from tests.helpers import profile_examples as examples

GIB = 2**30
HOW = how(Method.parse("momentum:k=3"))


def method(spec: str) -> Method:
    """The method of that spec."""
    return Method.parse(spec)


def measured(
    spec: str, peak: float, seconds: float | None = 1.0, spread: float = 0.0, phase: str = "backward", **held: float
) -> Result:
    """A method with this peak in GiB, `held` by categories (the rest is stored activations), and times in seconds."""
    of_category = {c.value: round(held.get(c.value, 0) * GIB) for c in Category}
    of_category[Category.STORED_ACTIVATIONS] += round(peak * GIB) - sum(of_category.values())
    peaks = {name: round(peak * GIB) if name == phase else round(peak * GIB) // 2 for name in ("forward", "backward")}
    memory = Memory(
        peak_bytes=round(peak * GIB),
        phase=phase,
        phase_peaks={**peaks, "optimizer": round(peak * GIB) if phase == "optimizer" else GIB // 8},
        kept_bytes=0,
        process_bytes=0,
        host_bytes=0,
        attributed_bytes=round(peak * GIB),
        categories=of_category,
        block_bytes=(GIB // 4,) * 8 if spec == "plain" else (),
    )
    # Quartiles of five even steps: the second and the fourth.
    steps = () if seconds is None else tuple(seconds * (1 + spread * (i - 2) / 2) for i in range(5))
    halves, quarters = tuple(s / 2 for s in steps), tuple(s / 4 for s in steps)
    rounds = (Round(0, halves, quarters, quarters),) if steps else ()
    return Result(method(spec), Status.MEASURED, memory=memory, rounds=rounds)


def profile(*results: Result, **changed: Any) -> Profile:
    """A pretrained model of 8 blocks at a batch of 4 and 256 tokens, without a limit."""
    fresh = {"points": (), "blocks": 8, "recommendation": None, "device": None}
    return replace(examples.smollm2(), results=results, **{**fresh, **changed})


def advised(*results: Result, **changed: Any) -> Recommendation:
    """What is advised for it."""
    return advise(profile(*results, **changed))


def point(spec: str, axis: str, value: int, peak: float, seconds: float) -> Point:
    """The largest value that fits, timed three times."""
    return Point(axis, value, spec, Status.MEASURED, round(peak * GIB), (seconds,) * 3, largest=True)


class TestMemory:
    """The goal is memory."""

    def test_the_lowest_peak_without_a_budget(self) -> None:
        """A reversible method that is a tenth below checkpointing is worth its conversion, and says how."""
        found = advised(measured("plain", 10), measured("checkpoint", 5), measured("momentum:k=3", 4.5))
        assert found.method == "momentum:k=3"
        assert found.why == (
            "convert with momentum k=3: the lowest peak, 4.50 GiB, where plain training needs 10.0 GiB"
        )
        assert found.advice[0] == HOW

    def test_less_than_five_percent_is_not_worth_it(self) -> None:
        """Checkpointing then, with what the other would have saved."""
        found = advised(measured("plain", 10), measured("checkpoint", 5), measured("momentum:k=3", 4.8))
        assert found.method == "checkpoint"
        assert "checkpointing is enough: it peaks at 5.00 GiB, where plain training needs 10.0 GiB" in found.why
        assert "momentum k=3, the lowest, saves only 205 MiB (4.0%) more and is no faster" in found.why
        assert HOW not in found.advice

    def test_less_than_five_percent_is_worth_it_where_it_is_faster(self) -> None:
        """By more than the spread."""
        rivals = (measured("plain", 10), measured("checkpoint", 5, 1.0))
        assert advised(*rivals, measured("momentum:k=3", 4.8, 0.9)).method == "momentum:k=3"
        assert advised(*rivals, measured("momentum:k=3", 4.8, 0.9, spread=0.2)).method == "checkpoint"

    def test_plain_where_nothing_lowers_the_peak(self) -> None:
        """The optimiser step binds all of them alike."""
        found = advised(measured("plain", 5), measured("checkpoint", 4.9), measured("momentum:k=3", 4.9))
        assert found.method == "plain"
        assert found.why.startswith("do not convert: plain training peaks at 5.00 GiB, and checkpointing, the lowest")

    def test_checkpointing_with_the_same_loss_is_the_rival(self) -> None:
        """The chunked loss is no merit of the coupling."""
        results = [measured("plain", 10), measured("checkpoint", 5), measured("momentum:k=3,loss=chunked", 3)]
        found = advised(*results)
        assert found.method == "momentum:k=3,loss=chunked"
        assert any("measure checkpoint:loss=chunked for a fair match" in text for text in found.advice)
        found = advised(*results, measured("checkpoint:loss=chunked", 3.1))
        assert found.method == "checkpoint:loss=chunked"

    def test_a_chunked_loss_that_saves_little_is_not_worth_it(self) -> None:
        """It takes time, and the optimiser step may bind anyway."""
        chunked = measured("checkpoint:loss=chunked", 4.9, 1.1)
        found = advised(measured("plain", 10), measured("checkpoint", 5), chunked)
        assert found.method == "checkpoint" and "checkpoint, chunked loss, the lowest, saves only" in found.why
        momentum = measured("momentum:k=3,loss=chunked", 4.88, 1.1)
        assert advised(measured("plain", 10), measured("checkpoint", 5), chunked, momentum).method == "checkpoint"

    def test_plain_under_a_budget_where_nothing_is_faster(self) -> None:
        """Whatever would be lower; what measured faster is recommended instead."""
        results = (measured("plain", 9), measured("checkpoint", 5))
        found = advised(*results, budget_bytes=10 * GIB)
        assert found.method == "plain"
        assert "do not convert: plain training peaks at 9.00 GiB of the 10.0 GiB there are" in found.why
        assert advised(*results, measured("sac", 6, 0.5), budget_bytes=10 * GIB).method == "sac"

    def test_the_fastest_that_fits(self) -> None:
        """A budget is there to be used."""
        results = (measured("plain", 12, 1), measured("checkpoint", 5, 2), measured("momentum:k=3,keep_last=4", 8, 1.5))
        found = advised(*results, budget_bytes=10 * GIB)
        assert found.method == "momentum:k=3,keep_last=4"
        assert "nothing that fits is faster than its 683 tokens a second" in found.why

    def test_a_narrow_fit_is_said(self) -> None:
        """With less than a tenth to spare."""
        found = advised(measured("plain", 12), measured("checkpoint", 9.8), budget_bytes=10 * GIB)
        assert found.method == "checkpoint"
        assert "9.80 GiB of the 10.0 GiB there are" in found.why and found.why.endswith("it fits narrowly")

    def test_nothing_fits_and_why(self) -> None:
        """With what dominates the best of them; the five percent count here too."""
        results = (measured("plain", 12), measured("checkpoint", 6, optimizer_state=5), measured("momentum:k=3", 5.9))
        found = advised(*results, budget_bytes=4 * GIB)
        assert found.method is None
        assert found.why == (
            "nothing fits: even checkpointing needs 6.00 GiB of the 4.00 GiB there are; 5.00 GiB of optimiser state "
            "are there whatever is done with the activations"
        )
        assert HOW not in advised(measured("momentum:k=3", 6), budget_bytes=4 * GIB).advice

    def test_the_devices_memory_is_the_limit_where_there_is_no_budget(self) -> None:
        """8 GiB of the two cores, less what a framework takes."""
        found = advised(measured("plain", 12), measured("checkpoint", 9), device=examples.CPU)
        assert "needs 9.00 GiB of the 7.00 GiB to use on two cores" in found.why

    def test_out_of_memory_is_told_of_plain(self) -> None:
        """It has no figure, and is no candidate."""
        over = Result(method("plain"), Status.OUT_OF_MEMORY, "stopped")
        found = advised(over, measured("checkpoint", 5))
        assert found.method == "checkpoint" and "where plain training does not fit" in found.why


class TestPretrained:
    """A coupling that loses the function."""

    def test_is_not_recommended_to_a_pretrained_model(self) -> None:
        """However low its peak."""
        results = (measured("plain", 10), measured("checkpoint", 5), measured("leapfrog", 1))
        assert advised(*results).method == "checkpoint"

    def test_is_recommended_from_scratch_in_so_many_words(self) -> None:
        """And LoRA, which needs pretrained weights, is not advised."""
        results = (measured("plain", 10), measured("checkpoint", 5), measured("leapfrog", 1, optimizer_state=0.9))
        found = advised(*results, pretrained=False)
        assert found.method == "leapfrog" and "training from scratch" in found.why
        assert not any("LoRA" in text for text in found.advice)
        assert any("8-bit optimiser" in text for text in found.advice)


class TestThroughput:
    """The goal is throughput."""

    def test_plain_is_fastest_where_it_fits(self) -> None:
        """Nothing is gained from a conversion, in numbers."""
        found = advised(measured("plain", 5, 1), measured("checkpoint", 2, 1.25), goal="throughput")
        assert found.method == "plain"
        assert found.why.startswith("do not convert: plain training peaks at 5.00 GiB, and nothing is faster than its")
        assert "its 1,024 tokens a second; checkpointing reaches 819 tokens a second" in found.why

    def test_what_does_not_fit_the_budget_does_not_count(self) -> None:
        """Plain is faster, and too large."""
        results = (measured("plain", 5, 1), measured("checkpoint", 2, 1.25))
        assert advised(*results, goal="throughput", budget_bytes=4 * GIB).method == "checkpoint"

    def test_the_largest_batch_may_turn_it_round(self) -> None:
        """At a batch of 40 the reversible chain takes less time per sample than checkpointing at 8."""
        results = (measured("plain", 5, 1), measured("checkpoint", 2, 1.25), measured("momentum:k=3", 1.5, 1.3))
        points = (
            *(point("plain", "batch", 5, 6, 1.2), point("checkpoint", "batch", 8, 6, 2.0)),
            *(point("momentum:k=3", "batch", 40, 6, 8.0), point("momentum:k=3", "sequence", 9999, 6, 0.1)),
        )
        found = advised(*results, goal="throughput", points=points, budget_bytes=6 * GIB)
        assert found.method == "momentum:k=3"
        assert found.why == (
            "convert with momentum k=3: 1,280 tokens a second, the most that fits; it peaks at 6.00 GiB of the "
            "6.00 GiB there are at a batch of 40; plain training reaches 1,067 tokens a second at a batch of 5; "
            "checkpointing reaches 1,024 tokens a second at a batch of 8"
        )
        assert any("all that at a batch of 4" in text for text in found.advice)

    def test_differences_within_the_spread_do_not_count(self) -> None:
        """3 % more with quartiles 4 % apart is no reason to convert, and that is said."""
        results = (measured("checkpoint", 2, 1.03, 0.04), measured("momentum:k=3", 1.5, 1.0, 0.04))
        found = advised(*results, goal="throughput")
        assert found.method == "checkpoint"
        assert "(momentum k=3 measured 3.0% more, within the spread of the samples, 4.0%)" in found.why
        steady = (measured("checkpoint", 2, 1.03, 0.01), measured("momentum:k=3", 1.5, 1.0, 0.01))
        assert advised(*steady, goal="throughput").method == "momentum:k=3"

    def test_only_a_batch_known_as_the_largest_counts(self) -> None:
        """A sweep that was broken off says nothing of how far a method gets."""
        broken_off = replace(point("checkpoint", "batch", 80, 3, 1.0), largest=False)
        results = (measured("plain", 5, 1), measured("checkpoint", 2, 1.25))
        found = advised(*results, goal="throughput", points=(broken_off,))
        assert found.method == "plain"

    def test_only_the_largest_batch_fits(self) -> None:
        """The setting's own size may be too large where a smaller batch fits."""
        found = advised(
            measured("checkpoint", 8),
            goal="throughput",
            budget_bytes=4 * GIB,
            points=(point("checkpoint", "batch", 2, 4, 0.5),),
        )
        assert found.method == "checkpoint" and "at a batch of 2" in found.why

    def test_untimed_methods_are_not_compared(self) -> None:
        """A run that was interrupted before any time was taken."""
        found = advised(measured("checkpoint", 2, None), measured("plain", 3, None), goal="throughput")
        assert found.method == "plain" and "nothing was timed yet" in found.why


class TestContext:
    """The goal is a long sequence."""

    def test_the_longest_swept_sequence(self) -> None:
        """The sweep decides, not the peak at the setting's size."""
        results = (measured("plain", 5), measured("checkpoint", 1), measured("momentum:k=3", 2))
        points = (
            *(point("plain", "sequence", 512, 6, 1), point("checkpoint", "sequence", 2048, 6, 1)),
            point("momentum:k=3", "sequence", 4096, 6, 1),
        )
        found = advised(*results, goal="context", points=points, budget_bytes=6 * GIB)
        assert found.method == "momentum:k=3"
        assert "4,096 tokens in 6.00 GiB at a batch of 4, measured in a sweep" in found.why
        assert "plain training reaches 512 tokens in 6.00 GiB; checkpointing reaches 2,048 tokens" in found.why

    def test_a_little_longer_is_not_worth_it(self) -> None:
        """The five percent count in tokens too."""
        results = (measured("checkpoint", 2), measured("momentum:k=3", 2))
        points = (point("checkpoint", "sequence", 2000, 6, 1), point("momentum:k=3", "sequence", 2100, 6, 1))
        assert advised(*results, goal="context", points=points).method == "checkpoint"

    def test_extrapolation_is_a_straight_line_and_says_so(self) -> None:
        """1 GiB is fixed and 1 GiB takes 256 tokens: 5 GiB hold four times as many."""
        results = (measured("plain", 5, parameters=1), measured("checkpoint", 2, parameters=1))
        found = advised(*results, goal="context", budget_bytes=5 * GIB)
        assert found.method == "checkpoint"
        assert "1,024 tokens in 5.00 GiB" in found.why and "extrapolated on a straight line" in found.why
        assert "plain training reaches 256 tokens" in found.why

    def test_extrapolation_of_a_peak_that_does_not_grow(self) -> None:
        """Where the optimiser step binds, the backward pass grows: 2 GiB for 256 tokens beside 1 GiB of weights."""
        result = measured("plain", 6, phase="optimizer", parameters=1, gradients=1)
        found = advised(result, goal="context", budget_bytes=9 * GIB)
        assert "1,024 tokens in 9.00 GiB" in found.why
        assert advised(result, goal="context", budget_bytes=5 * GIB).why.startswith("nothing fits")

    def test_without_a_limit_the_least_per_token(self) -> None:
        """Nothing to fill: bytes a token."""
        results = (measured("plain", 5, parameters=1), measured("checkpoint", 2, parameters=1))
        found = advised(*results, goal="context")
        assert found.method == "checkpoint" and "4.00 MiB a token" in found.why

    def test_a_model_without_sequence_is_advised_on_memory(self) -> None:
        """Images have no context to lengthen."""
        base = profile(measured("plain", 10), measured("checkpoint", 5), goal="context")
        found = advise(replace(base, setting=replace(base.setting, sequence=None)))
        assert found.method == "checkpoint" and "lowest peak" in found.why


class TestWhatIsKnown:
    """Measurements come before predictions."""

    def test_predictions_count_where_nothing_was_measured(self) -> None:
        """And the reason says so."""
        found = advise(examples.predicted_only())
        assert found.method == "checkpoint"
        assert found.why.startswith("predicted, nothing was measured: ")

    def test_predictions_do_not_count_beside_measurements(self) -> None:
        """A waiting method whose prediction is lowest is not chosen."""
        found = advise(examples.interrupted())
        assert found.method == "checkpoint" and "predicted" not in found.why

    def test_refused_and_failed_methods_are_not_chosen(self) -> None:
        """Their predictions do not count either."""
        refused = [replace(r, status=Status.REFUSED) for r in examples.predicted_only().results[1:]]
        found = advise(replace(examples.predicted_only(), results=(examples.predicted_only().results[0], *refused)))
        assert found.method == "plain"

    def test_nothing_known(self) -> None:
        """Said as it is."""
        found = advised(Result(method("checkpoint"), Status.PENDING))
        assert found.method is None and "nothing is known yet" in found.why


class TestAdvice:
    """The lines below."""

    def test_a_measured_chunked_loss_is_told_in_numbers(self) -> None:
        """Instead of the size of the logits."""
        results = (measured("checkpoint", 5, 1.0, logits_and_loss=3), measured("checkpoint:loss=chunked", 4.9, 1.1))
        (line,) = (text for text in advised(*results).advice if "chunked loss lowers" in text)
        assert line == (
            "the chunked loss lowers the peak of checkpointing from 5.00 GiB to 4.90 GiB, at +10.0% in time "
            "(autorev.chunk_loss(model))"
        )
        assert not any("your logits" in text for text in advised(*results).advice)

    def test_large_logits_are_told_where_chunking_was_not_measured(self) -> None:
        """From a fifth of the peak on, and not to who uses it already."""
        assert any("your logits take 1.00 GiB" in t for t in advised(measured("plain", 5, logits_and_loss=1)).advice)
        assert not any("your logits" in t for t in advised(measured("plain", 5, logits_and_loss=0.9)).advice)
        chunked = advised(measured("plain:loss=chunked", 5, logits_and_loss=3))
        assert not any("your logits" in text or "chunk_loss" in text for text in chunked.advice)

    @pytest.mark.parametrize(
        ("phase", "state", "told"), [("backward", 2, True), ("optimizer", 1, True), ("backward", 1, False)]
    )
    def test_lora_where_the_optimiser_weighs_or_binds(self, phase: str, state: float, told: bool) -> None:
        """Two of five GiB, or any share in the optimiser step."""
        found = advised(measured("plain", 5, phase=phase, optimizer_state=state))
        assert any("LoRA (--trains lora) frees most of" in text for text in found.advice) is told

    def test_the_most_effective_comes_first(self) -> None:
        """3 GiB of logits before 2 GiB of optimiser state, and the other way round."""
        many = advised(measured("plain", 6, logits_and_loss=3, optimizer_state=2.5)).advice
        few = advised(measured("plain", 6, logits_and_loss=2, optimizer_state=2.5)).advice
        assert "your logits" in many[0] and "LoRA" in many[1]
        assert "LoRA" in few[0]

    def test_keep_last_where_room_is_left(self) -> None:
        """5 GiB to nine tenths of the limit hold 8 blocks of a quarter; all there are, if there is more."""
        results = (measured("plain", 20), measured("momentum:k=3", 4))

        def line(budget: float, *more: Result) -> list[str]:
            found = advised(*results, *more, budget_bytes=round(budget * GIB)).advice
            return [text for text in found if "keep_last=" in text and "are left" in text]

        assert line(5)[0].startswith(
            "512 MiB are left at this size: with keep_last=2 the last 2 blocks of 8 keep 256 MiB"
        )
        assert "keep_last=7" in line(12)[0]  # all eight would be plain training
        assert not line(4.5)
        assert not line(10, measured("momentum:k=3,keep_last=4", 5, 0.5))

    @pytest.mark.parametrize(
        ("category", "told"),
        [
            ("parameters", "a 16-bit dtype (--dtype bf16) halves it"),
            ("gradients", "an optimiser that steps during backward"),
            ("optimizer_state", "LoRA (--trains lora) or an 8-bit optimiser"),
            ("stored_activations", "checkpointing or a reversible chain stores less"),
            ("working_set", "a smaller batch with gradient accumulation"),
            ("side_bits", "a larger gamma"),
            ("logits_and_loss", "the chunked loss (autorev.chunk_loss(model)) lowers it"),
        ],
    )
    def test_what_binds_and_what_would_move_it(self, category: str, told: str) -> None:
        """Phase, share, category, and one thing to do."""
        found = advised(measured("plain", 5, **{category: 4})).advice
        (line,) = (text for text in found if text.startswith("what binds"))
        assert line.startswith("what binds: the peak of plain training stands in backward, and ")
        assert told in line and ("80%" in line or category == "stored_activations")

    def test_what_binds_knows_the_setting(self) -> None:
        """No advice that was followed already."""
        base = profile(measured("plain:loss=chunked", 5, parameters=4))
        bf16 = advise(replace(base, setting=replace(base.setting, dtype="bf16"))).advice
        assert any("only a smaller model lowers it" in text for text in bf16)
        state = profile(measured("plain", 5, optimizer_state=4))
        small = replace(state, setting=replace(state.setting, optimizer="adamw-8bit", trains="lora"))
        assert any("SGD (--optimizer sgd) keeps none" in text for text in advise(small).advice)

    def test_checkpointing_is_always_compared(self) -> None:
        """Its peak and its throughput, relative to what is recommended."""
        found = advised(measured("checkpoint", 5, 1.0), measured("momentum:k=3", 4, 1.25))
        (line,) = (text for text in found.advice if text.startswith("the rival"))
        assert line == (
            "the rival: checkpointing peaks at 5.00 GiB, +25.0% against momentum k=3's 4.00 GiB, at 1,024 tokens a "
            "second to 819.2 (+25.0%)"
        )

    def test_a_chosen_checkpoint_is_compared_with_the_best_chain(self) -> None:
        """Of those that keep the function."""
        found = advised(measured("checkpoint", 5), measured("leapfrog", 1), measured("momentum:k=3", 4.9))
        assert any(text.startswith("the rival: momentum k=3 peaks at 4.90 GiB, -2.0%") for text in found.advice)
        alone = advised(measured("checkpoint", 5), measured("leapfrog", 1)).advice
        assert any("no reversible method that keeps the function was measured" in text for text in alone)

    def test_a_rival_without_figures_is_told_too(self) -> None:
        """Not measured, or not to be had, or not timed."""
        alone = advised(measured("momentum:k=3", 4)).advice
        assert any("checkpointing, the rival to beat, was not measured" in text for text in alone)
        over = Result(method("checkpoint"), Status.OUT_OF_MEMORY, "stopped at 4.49 GiB")
        beside = advised(measured("momentum:k=3", 4), over).advice
        assert any("the rival: checkpoint, out of memory: stopped at 4.49 GiB" in text for text in beside)
        untimed = advised(measured("momentum:k=3", 4), measured("checkpoint", 5, None)).advice
        assert any("not both were timed" in text for text in untimed)

    def test_a_rival_within_the_spread_is_said_to_be(self) -> None:
        """Its difference in time means nothing."""
        found = advised(measured("checkpoint", 5, 1.0, 0.08), measured("momentum:k=3", 4, 1.04, 0.02))
        assert any("(+4.0%, within the spread of 8.0%)" in text for text in found.advice)

    def test_doubtful_times_are_named(self) -> None:
        """Wide quartiles and too few samples; steady ones are not."""
        few = measured("sac", 6, None)
        few = replace(few, rounds=(Round(0, (1.0,), (1.0,), (1.0,)),))
        found = advised(measured("plain", 9, 1, 0.05), measured("checkpoint", 5, 1, 0.3), few)
        (line,) = (text for text in found.advice if "in doubt" in text)
        assert "for checkpoint (quartiles 30% apart), sac (1 sample only): measure more rounds" in line
        assert not any("in doubt" in text for text in advised(measured("plain", 9, 1, 0.05)).advice)
