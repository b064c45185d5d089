"""The beginning of the report: one table over the stages, where each comes from, the contents; long tables fold."""

import json

from dataset.overview import anchor, folded, with_overview


def stage(out, name: str, scores: dict, logged: float, **record) -> None:
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "log.jsonl").write_text(json.dumps({"step": 1, "seconds": logged}) + "\n")
    if record:
        (folder / "run.json").write_text(json.dumps(record))


def test_the_report_begins_with_a_table_over_the_stages_and_the_contents(tmp_path):
    scores = {"world/exact": 0.9143, "world/n": 3474, "world/caption": 0.93, "hallucination/false": 0.445}
    stage(tmp_path, "sft", scores, 882.31, command="python 2-sft_vlm.py", commit="0123456789abcdef", device="cpu, torch.float32",
          platform="Linux", seconds=901.5)  # fmt: skip
    stage(tmp_path, "grpo", {"world/exact": 0.9}, 267.77)
    page = with_overview("# Report\n\nold beginning\n\n## A (b)\n\nfirst\n\n## C\n\nsecond\n", tmp_path)
    assert page.splitlines()[:9] == [
        "# Report", "", "| | SFT | RL |", "| --- | --- | --- |", "| captions that name all and nothing else | 93.0 % |  |",
        "| questions about scenes, right | 91.4 % (n 3,474) | 90.0 % |",
        "| descriptions with something false (lower is better) | 44.5 % |  |", "| time | 15 min 1 s | 4 min 27 s |", "",
    ]  # fmt: skip
    assert "; `python 2-sft_vlm.py`; commit 0123456789ab; cpu, torch.float32, Linux\n- RL: 20" in page
    assert page.endswith("Contents:\n\n- [A (b)](#a-b)\n- [C](#c)\n\n## A (b)\n\nfirst\n\n## C\n\nsecond\n")
    assert with_overview(page, tmp_path) == page


def test_a_page_beside_no_stage_begins_with_its_contents(tmp_path):
    assert with_overview("# Report\n\n## Study: x\n\ntext\n", tmp_path) == (
        "# Report\n\nContents:\n\n- [Study: x](#study-x)\n\n## Study: x\n\ntext\n")


def test_an_address_is_the_one_that_github_gives_a_heading():
    assert anchor("Preference learning: dpo_2") == "preference-learning-dpo_2"


def test_only_long_tables_fold():
    short, long = ("| a |\n| --- |\n" + "| 1 |\n" * rows for rows in (12, 13))
    assert folded(f"text\n\n{short}") == f"text\n\n{short}".strip()
    assert folded(f"text\n\n{long}\nmore\n\n{short}") == (
        f"text\n\n<details><summary>13 rows</summary>\n\n{long}\n</details>\n\nmore\n\n{short}".strip())
