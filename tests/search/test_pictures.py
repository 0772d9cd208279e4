"""Pictures: kept beside the ledger, drawn for a report, and never worth a reward."""

import logging
from dataclasses import replace

from crdiff_core.prompts import Prompt
from search.comparison import telling
from search.pictures import Pictures
from search.storage import Storage
from tests.search.landscapes import PROMPTS, RECIPE, make_search, measure, work

CATS = [Prompt("a cat", "a", 1), Prompt("a cat", "b", 2), Prompt("two\ncats", "c", 1)]
NATIVE = "48x80"


def kept(folder):
    return Pictures(Storage.at(folder))


def test_what_was_kept_comes_back_in_any_session(tmp_path):
    pictures = kept(tmp_path)
    pictures.add("key", CATS, {0: b"first", 2: b"third"})
    pictures.add("other", CATS[:1], {0: b"another"})

    for each in (pictures, kept(tmp_path)):
        assert each.get("key", CATS) == [b"first", None, b"third"]
        assert each.get("other", CATS[:2]) == [b"another", None]
    pictures.add("key", CATS, {1: b"second"})
    assert pictures.get("key", CATS) == [b"first", b"second", b"third"]


def test_nothing_is_written_for_no_pictures(tmp_path):
    kept(tmp_path / "new").add("key", CATS, {})

    assert not (tmp_path / "new").exists()


def test_a_damaged_file_is_left_out(tmp_path, caplog):
    kept(tmp_path).add("key", CATS, {0: b"first"})
    kept(tmp_path).add("key", CATS, {1: b"second"})
    first = min(tmp_path.glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-9])

    assert kept(tmp_path).get("key", CATS) == [None, b"second", None]
    assert f"{first} cannot be read and is left out" in caplog.text


def test_a_place_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        kept(tmp_path / "file").add("key", CATS, {0: b"first"})

    assert "pictures are not kept: " in caplog.text


# --- what a search draws for its report ------------------------------------------------------


def drawing(search, drawn):
    """An outcome for `work` that also returns what was to be kept, and notes what was drawn."""

    def outcome(ratios, prompts):
        config = drawn.pop()
        drawn.append((config, prompts))
        measured = measure(ratios, prompts)
        keep = {place: prompts[place].text.encode() for place in config["keep"]}
        return {"measured": replace(measured, pictures=keep), "done": True}

    suggest = search.suggest

    def noting(trial_id):
        config = suggest(trial_id)
        if isinstance(config, dict):
            drawn.append(config)
        return config

    search.suggest = noting
    return outcome


def searched(folder, **arguments):
    """A finished search that keeps pictures, and the (config, prompts) of its trials."""
    search = make_search(
        folder / "ledger", steps=5, pictures=kept(folder / "pictures"), **arguments
    )
    drawn = []
    work(search, outcome=drawing(search, drawn))
    assert search.finished
    assert search.failure is None
    return search, drawn


def test_a_finished_search_has_drawn_what_its_report_compares_with(tmp_path):
    search, drawn = searched(tmp_path, num_shown=6, native=NATIVE)
    winner, dense = search.of("validation"), search.of("dense validation")
    alone, resized = search.of("pruned alone"), search.of("resized")
    gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
    shown = telling(gains, 6)
    numbers = sorted([*shown.first, *shown.gains, *shown.losses])
    prompts = tuple(PROMPTS["validation"].prompts[number] for number in numbers)

    assert alone.prompts.prompts == resized.prompts.prompts == prompts
    assert alone.ratios == winner.ratios
    assert (alone.candidate.poa_weight, resized.candidate.drawn_at) == (1.0, NATIVE)
    assert resized.ratios.is_dense
    assert len({alone.key, resized.key, winner.key, dense.key}) == 4
    assert {config["drawn_at"] for config, _ in drawn} == {"requested", NATIVE}
    pictures = kept(tmp_path / "pictures")
    wanted = [prompt.text.encode() for prompt in prompts]
    for evaluation in (winner, dense, alone, resized):
        assert pictures.get(evaluation.key, prompts) == wanted
    done, total = search.progress
    assert done == total == 1 + 5 + 3 + 2 + 2


def test_run_again_it_draws_nothing_more(tmp_path):
    first, _ = searched(tmp_path, num_shown=6, native=NATIVE)
    again, drawn = searched(tmp_path, num_shown=6, native=NATIVE)

    assert drawn == []
    assert [e.key for e in again.evaluations] == [e.key for e in first.evaluations]


def test_without_pictures_nothing_is_drawn_for_a_report(tmp_path):
    search = make_search(tmp_path, steps=5, num_shown=6, native=NATIVE)
    work(search)

    assert search.finished
    assert search.of("pruned alone") is search.of("resized") is None
    assert search.progress == (11, 11)


def test_where_the_pruned_model_alone_is_searched_it_is_not_drawn_again(tmp_path):
    search, _ = searched(tmp_path, num_shown=6, recipe=replace(RECIPE, poa_weight=1.0))

    assert search.of("pruned alone") is None
    assert search.progress == (11, 11)


def test_a_failed_picture_fails_no_search(tmp_path):
    search = make_search(
        tmp_path / "ledger",
        steps=5,
        pictures=kept(tmp_path / "pictures"),
        num_shown=6,
        native=NATIVE,
    )
    drawn = []
    draw = drawing(search, drawn)

    def outcome(ratios, prompts):
        is_native = drawn[-1]["drawn_at"] == NATIVE
        reported = draw(ratios, prompts)
        return {"failure": "no memory", "transient": False} if is_native else reported

    work(search, outcome=outcome)

    assert search.finished
    assert search.failure is None
    assert search.of("resized").failure == "no memory"
    assert search.of("pruned alone").is_complete
    assert search.winner is not None


def test_a_budget_leaves_room_for_the_report(tmp_path):
    search, drawn = searched(
        tmp_path, num_shown=6, native=NATIVE, budget={"pictures": 7 * 3 + 3 * 8 + 2 * 10 + 2 * 6}
    )

    assert search.ended_by is not None
    # Without what fills batches up.
    assert sum(len(set(prompts)) for _, prompts in drawn) <= 7 * 3 + 3 * 8 + 2 * 10 + 2 * 6


def test_a_warm_start_takes_no_resized_picture_for_the_dense_model(tmp_path):
    first, _ = searched(tmp_path, num_shown=6, native=NATIVE)
    candidates = list(first._ledger.candidates.values())
    second = make_search(tmp_path / "ledger", steps=5, run="other", warm_start=candidates)

    assert NATIVE in {candidate.drawn_at for candidate in candidates}
    assert {candidate.drawn_at for candidate in second.warm_start} == {"requested"}
