"""Defects seen in other code bases, by number, and the test here that would notice each.

The numbers are those of a list of 38 that was made by reading and running MiniMind-V, MiniMind, nanoVLM, TinyLLaVA Factory,
MM-EUREKA, LMM-R1 and RLAIF-V. Guards that belong to no other file stand below the table.
"""

import ast
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from dataset.images import from_image
from dataset.mixture import load
from dataset.vision.image_processor import ImageProcessor, OneRank
from model.encoder.clip import clip_random
from tests.conftest import ROOT
from tests.test_structure import FUNCTIONS, SCRIPTS, TREES

GUARDS = {  # number: (what went wrong, the tests that guard it as file::function)
    1: ("two adjacent <image> merge into one", "test_conversations::test_each_way_to_write_a_question_with_pictures",
        "test_vlm::test_each_placeholder_is_replaced_by_its_own_image_token"),
    2: ("rows with different numbers of images crash", "test_collate::test_pictures_come_in_reading_order",
        "test_generate::test_a_batch_of_unlike_prompts_answers_as_each_prompt_alone"),
    3: ("extra placeholders or images pass silently",
        "test_vlm::test_a_missing_or_extra_image_is_an_error_that_counts_both_and_names_the_samples",
        "test_conversations::test_a_broken_row_says_where_why_and_what_to_do"),
    4: ("L, P, 1, I;16 and CMYK images raise", "test_images::test_every_mode_becomes_rgb"),
    5: ("the policy samples the placeholder", "test_generate::test_banned_tokens_are_never_sampled_at_any_temperature",
        "test_losses::test_banned_tokens_have_probability_zero_and_the_rest_sum_to_one"),
    6: ("truncation cuts an image or all that is learned",
        "test_processor::test_truncation_at_every_length_keeps_whole_pictures_and_something_to_learn",
        "test_conversations::test_a_row_truncated_to_nothing_is_named_too"),
    7: ("pixels are not normalised as the encoder expects", "test_traps::test_pixels_are_normalised_as_the_encoder_states"),
    8: ("a Python loop over samples splices the images", "test_traps::test_images_are_spliced_without_a_loop"),
    9: ("a typed assistant marker is learned as an answer", "test_processor::test_control_tokens_that_a_user_types_stay_text",
        "test_tokenizer::test_a_control_token_that_a_user_types_stays_text"),
    10: ("labels are searched for in the tokens", "test_processor::test_exactly_the_answers_and_their_ends_are_learned",
         "test_processor::test_prompt_and_answer_make_the_document_in_every_template"),
    11: ("the end of a turn is never learned",
         "test_losses::test_the_first_answer_token_and_the_end_of_turn_are_learned_once_each",
         "test_generate::test_an_answer_ends_at_a_stop_token_which_is_scored_but_not_part_of_it"),
    12: ("the first token of an answer is not learned",
         "test_losses::test_the_first_answer_token_and_the_end_of_turn_are_learned_once_each"),
    13: ("padding is the end of a turn", "test_tokenizer::test_end_of_turn_padding_and_beginning_are_three_tokens",
         "test_losses::test_padding_is_never_a_target_even_when_it_is_labelled"),
    14: ("a checkpoint that does not fit loads without a word",
         "test_checkpoint::test_weights_that_do_not_fit_are_refused_by_name"),
    15: ("a missing encoder becomes None", "test_clip::test_a_missing_encoder_file_names_the_command_that_makes_it",
         "test_checkpoint::test_another_encoder_of_the_same_name_is_refused"),
    16: ("the last update is not saved", "test_traps::test_the_checkpoint_holds_the_last_update"),
    17: ("resuming restores the weights alone",
         "test_checkpoint::test_a_resumed_run_ends_with_the_same_optimizer_and_random_numbers",
         "test_checkpoint::test_a_killed_run_goes_on_to_exactly_the_same_weights",
         "test_traps::test_nothing_draws_over_the_random_numbers_that_resuming_restored"),
    18: ("the frozen encoder is in every checkpoint",
         "test_checkpoint::test_a_frozen_pretrained_encoder_is_named_and_not_stored"),
    19: ("the name of a folder means something", "test_checkpoint::test_names_of_folders_mean_nothing"),
    20: ("training that goes around the wrapper of DDP", "test_dpo::test_two_processes_equal_one_that_accumulates"),
    21: ("a reference of another precision or mode", "test_dpo::test_the_loss_at_step_zero_is_exactly_ln_2"),
    22: ("log-probabilities of another distribution than the sampled one",
         "test_generate::test_samples_and_their_log_probabilities_come_from_one_distribution"),
    23: ("the mean over micro-batches, not over tokens", "test_runtime::test_two_processes_equal_one_that_accumulates",
         "test_losses::test_log_probabilities_of_parts_are_those_of_the_whole"),
    24: ("the same random numbers on every rank",
         "test_runtime::test_weights_begin_alike_on_every_rank_and_random_numbers_do_not"),
    25: ("attention leaks between packed documents", "test_gpt::test_a_changed_document_never_moves_another"),
    26: ("--compile False is True", "test_scripts::test_a_switch_takes_no_word_so_false_is_never_true"),
    27: ("flags that nothing reads", "test_structure::test_every_flag_is_read"),
    28: ("device == 'cuda' is never true", "test_structure::test_no_file_contains_what_is_forbidden"),
    29: ("LoRA on square layers alone",
         "test_lora::test_every_linear_map_of_the_blocks_is_adapted_the_rectangular_ones_too"),
    30: ("rewards under `except: return 0`", "test_rewards::test_a_bug_in_a_reward_ends_the_run_and_is_not_a_zero"),
    31: ("dummy gradients", "test_structure::test_no_gradient_is_kept_alive_by_adding_nothing",
         "test_vlm::test_text_alone_touches_neither_encoder_nor_connector"),
    32: ("temperature 0 crashes", "test_generate::test_temperature_zero_takes_the_likeliest_token_with_certainty"),
    33: ("finished answers go on", "test_generate::test_finished_rows_leave_the_batch_and_the_others_go_on_unchanged"),
    34: ("the page forgets, ignores its port, and is open to all",
         "test_web_demo::test_every_message_and_every_picture_of_the_conversation_reaches_the_model",
         "test_web_demo::test_the_script_listens_on_this_machine_alone",
         "test_dialogue::test_the_second_message_is_answered_in_view_of_the_first_and_of_every_picture"),
    35: ("pushes, foreign accounts and job submission by default", "test_structure::test_no_file_contains_what_is_forbidden",
         "test_runtime::test_wandb_starts_only_when_asked_and_under_no_name_but_the_users"),
    36: ("sys.path edits: runs from one folder only", "test_structure::test_no_file_contains_what_is_forbidden",
         "test_scripts::test_a_run_from_another_folder_writes_into_that_folder"),
    37: ("every worker holds the whole parquet file", "test_files::test_parquet_keeps_few_row_groups_in_memory",
         "test_traps::test_a_parquet_source_holds_a_small_part_of_its_file"),
    38: ("README line counts, names and flags that no longer hold", "test_readme::test_line_counts_in_the_readme_are_right",
         "test_readme::test_commands_in_the_readme_exist_with_their_flags"),
}  # fmt: skip
NOT_YET: dict[int, str] = {}  # number: why nothing guards it


def test_every_trap_is_guarded_or_says_why_not():
    assert sorted([*GUARDS, *NOT_YET]) == list(range(1, 39))


@pytest.mark.parametrize("number", GUARDS)
def test_the_guards_of_a_trap_exist(number):
    _, *names = GUARDS[number]
    assert names
    for name in names:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


# ---------------------------------------------------------------- guards that stand nowhere else


def test_pixels_are_normalised_as_the_encoder_states():
    from PIL import Image

    encoder = clip_random(size=16, patch=8, width=16, layers=1, heads=2)
    encoder.mean, encoder.std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.4)
    pictures = [from_image(Image.new("RGB", (30, 20), colour)) for colour in ((51, 102, 153), (255, 255, 255), (0, 0, 0))]
    seen = ImageProcessor(encoder, "square", 0, None, OneRank())(pictures)  # (3, 3, 16, 16)
    assert torch.allclose(seen[0], torch.zeros(3, 16, 16), atol=1e-6)
    assert torch.allclose(seen[1], torch.tensor([8.0, 3.0, 1.0])[:, None, None].expand(3, 16, 16), atol=1e-5)
    assert torch.allclose(seen[2], torch.tensor([-2.0, -2.0, -1.5])[:, None, None].expand(3, 16, 16), atol=1e-5)


def test_images_are_spliced_without_a_loop():
    functions = {node.name: node for node in ast.walk(TREES[ROOT / "model" / "vlm.py"]) if isinstance(node, ast.FunctionDef)}
    for name in ("forward", "splice", "image_features"):
        code = ast.unparse(functions[name])
        loops = [node for node in ast.walk(functions[name]) if isinstance(node, ast.For | ast.While)]
        assert not loops and ".item()" not in code and ".tolist()" not in code
    assert "masked_scatter" in ast.unparse(functions["splice"])


def test_the_checkpoint_holds_the_last_update(one_process):
    """Five steps were asked for: the optimizer has made five, and the shared weights are those after the fifth.

    The connector has made fewer: a step without pictures gives it no gradient.
    """
    last = one_process / "resume" / "000005"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    for part in optimizer.values():
        assert max(int(state["step"]) for state in part["state"].values()) == 5
    assert json.loads((last / "state.json").read_text())["step"] == 5
    shared, kept = load_file(one_process / "model.safetensors"), load_file(last / "model.safetensors")
    assert all(torch.equal(shared[name], kept[name]) for name in shared)


LOOPS = [(script, node) for script in SCRIPTS for node in TREES[script].body
         if isinstance(node, ast.FunctionDef) and "run.resume(" in ast.unparse(node)]  # fmt: skip


@pytest.mark.parametrize(("script", "loop"), LOOPS, ids=[f"{script.name}-{loop.name}" for script, loop in LOOPS])
def test_nothing_draws_over_the_random_numbers_that_resuming_restored(script, loop):
    """Run.wrap seeds this rank, so it comes before Run.resume; nothing that runs after it seeds or makes weights."""
    code = ast.unparse(loop)
    (wrapped,) = re.finditer(r"(?<![.\w])prepare\(", code)
    assert wrapped.start() < code.index("run.resume(")
    assert any("run.wrap(" in ast.unparse(prepare) for prepare in FUNCTIONS["prepare"])
    parts = {node.name: node for node in TREES[script].body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    (at,) = [k for k, statement in enumerate(loop.body) if "run.resume(" in ast.unparse(statement)]
    after, followed = list(loop.body[at:]), set()
    while new := {node.id for code in after for node in ast.walk(code) if isinstance(node, ast.Name)} & set(parts) - followed:
        followed |= new
        after += [parts[name] for name in new]
    assert "finish" in followed or script.name[0] in "12"
    assert not [code for code in after if re.search(r"manual_seed|VLM\(|checkpoint\.load\(|\.wrap\(", ast.unparse(code))]


def test_all_four_loops_are_looked_at():
    assert [(script.name[0], loop.name) for script, loop in LOOPS] == [("1", "main"), ("2", "main"), ("3", "grpo"), ("3", "dpo")]


def test_a_parquet_source_holds_a_small_part_of_its_file(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    from dataset.formats import tables

    row_bytes, rows = 20_000, 400
    talk = json.dumps([{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Yes."}])
    noise = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = pyarrow.table({"conversations": [talk] * rows, "image_bytes": [bytes(line.tolist()) for line in noise]})
    parquet.write_table(table, tmp_path / "big.parquet", row_group_size=10)
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 1_000_000)  # of 8,000,000
    source = load(tmp_path / "big.parquet")
    before = pyarrow.total_allocated_bytes()
    for i in [*range(0, rows, 7), *range(0, rows, 11)]:
        assert len(source[i].pictures) == 1
        assert pyarrow.total_allocated_bytes() - before < 2_500_000
