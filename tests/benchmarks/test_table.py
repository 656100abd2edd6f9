"""Tables come from the JSON and from nothing else."""

import json

from benchmarks.table import render


def side(tokens, peak, **more):
    steps = {"p10": tokens - 1, "p50": tokens, "p90": tokens + 1}
    versions = {"torch": "2.0", "transformers": "5.0", "trl": "1.16.0"}
    one = {"tokens_per_second": tokens, "step_tokens_per_second": steps, "peak_bytes_above_weights": peak * 2**20}
    return one | {"ratio_to_floor": 0.5, "versions": versions, "threads": 2} | more


def peer(column, tokens, ours, **more):
    return side(tokens, 300, column=column, faults=[], ours_is_faster={"median": ours / tokens}, **more)


def write(folder, **changes):
    peers = {
        "shipped": peer("A", 50, 200),
        "plain": peer("B", 80, 200),
        "bfd": peer("B", 100, 200),
        "broken": {"column": "C", "faults": ["loss of step 0: 1 here, 2 there"]},
    }
    result = {"case": "sft", "ours": side(200, 100), "peers": peers, "best": ["shipped", "bfd"], "date": "2026-01-01"}
    result |= {"machine": {"cpu": "A processor"}, "settings": {"dtype": "float32"}}
    (folder / "sft.json").write_text(json.dumps(result | changes))


def test_a_case_is_one_row_with_the_best_way_of_each_column(tmp_path):
    write(tmp_path)
    row = next(line for line in render(tmp_path).splitlines() if line.startswith("| sft"))
    assert row == ("| sft | 200 (199 to 201) | 50% | 4.00x (shipped) | 2.00x (bfd) | – | 100, 300 MiB |")


def test_memory_is_beside_that_of_the_fastest_way_whatever_its_column(tmp_path):
    shipped, plain = peer("A", 150, 200) | {"peak_bytes_above_weights": 250 * 2**20}, peer("B", 100, 200)
    write(tmp_path, peers={"shipped": shipped, "plain": plain}, best=["shipped", "plain"])
    assert "| 100, 250 MiB |" in render(tmp_path)


def test_what_gave_no_number_is_told(tmp_path):
    write(tmp_path)
    text = render(tmp_path)
    assert "sft, broken: no number (loss of step 0: 1 here, 2 there)." in text
    assert "A processor, 2 threads, float32; torch 2.0, transformers 5.0, TRL 1.16.0; 2026-01-01." in text


def test_curves_stand_beside_their_expectation(tmp_path):
    curve = {"cost": "seconds", "against": "tokens", "sizes": [1, 2], "slope": 1.034, "expected": 1.0}
    (tmp_path / "growth.json").write_text(json.dumps({"curves": [curve]}))
    assert render(tmp_path).splitlines()[-1] == "| seconds | tokens (1, 2) | 1.03 | 1.00 |"


def test_nothing_measured_is_nothing_shown(tmp_path):
    assert render(tmp_path) == ""


def test_the_readme_shows_what_was_measured(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    shown = text.split("`python -m benchmarks.table`; a test compares -->\n")[1].split(
        "\n<!-- end of what is rendered"
    )[0]
    assert shown == render(repository / "benchmarks" / "results")
