"""Generation gives what the full forward pass gives, whoever shares the batch, and pays only for rows still going."""

import math

import pytest
import torch

from model.generate import decode, draw, generate, next_logits, prefill, sample, stream
from model.losses import IGNORE, score
from tests import tiny

PROMPTS = [
    tiny.document(6, [], seed=1),
    tiny.document(14, [2], seed=2),
    tiny.document(13, [1, 6], seed=3),
    tiny.document(5, [0], seed=4),
]
IMAGES = [0, 1, 2, 1]
PIXELS = tiny.pictures(sum(IMAGES), seed=5)
GREEDY = {"max_new_tokens": 20, "stop_ids": (), "temperature": 0.0}


def batch_of_all() -> dict:
    return {**tiny.padded(PROMPTS), "pixels": PIXELS}


def batch_of_one(index: int) -> dict:
    pixels = PIXELS.split(IMAGES)[index]
    return tiny.padded([PROMPTS[index]]) | ({"pixels": pixels} if len(pixels) else {})


def test_decoding_with_the_cache_equals_the_full_forward_pass():
    model = tiny.vlm()
    continuations = [tiny.document(8, [], seed=10 + row) for row in range(4)]
    whole = {**tiny.padded([a + b for a, b in zip(PROMPTS, continuations, strict=True)]), "pixels": PIXELS}
    with torch.no_grad():
        logits = model(whole, tiny.everywhere(whole))
    expected = logits.split([len(prompt) + 8 for prompt in PROMPTS])
    logits, cache = prefill(model, batch_of_all(), new_tokens=8)
    for step in range(8):
        there = torch.stack([rows[len(prompt) - 1 + step] for rows, prompt in zip(expected, PROMPTS, strict=True)])
        torch.testing.assert_close(logits, there, atol=2e-5, rtol=0)
        logits = decode(model, torch.tensor([row[step] for row in continuations]), cache)


def test_next_logits_are_those_after_each_prompt():
    model = tiny.vlm()
    torch.testing.assert_close(next_logits(model, batch_of_all()), prefill(model, batch_of_all(), new_tokens=8)[0])


def test_a_batch_of_unlike_prompts_answers_as_each_prompt_alone():
    model = tiny.vlm()
    together = generate(model, batch_of_all(), **GREEDY)
    assert len({tuple(answer.tokens) for answer in together}) == 4, "answers too alike to tell rows apart"
    for index, answer in enumerate(together):
        assert generate(model, batch_of_one(index), **GREEDY) == [answer]


def test_streaming_yields_the_tokens_of_generate():
    model = tiny.vlm()
    (answer,) = generate(model, batch_of_one(1), **GREEDY)
    assert list(stream(model, batch_of_one(1), **GREEDY)) == answer.tokens
    stop = answer.tokens[7]
    expected = answer.tokens[: answer.tokens.index(stop)]
    assert list(stream(model, batch_of_one(1), **{**GREEDY, "stop_ids": (stop,)})) == expected


def test_a_stop_button_ends_the_stream_before_the_next_token():
    presses = iter([False, False, True])
    tokens = list(stream(tiny.vlm(), batch_of_one(1), **GREEDY, should_stop=lambda: next(presses)))
    assert len(tokens) == 2


def test_an_answer_ends_at_a_stop_token_which_is_scored_but_not_part_of_it():
    model = tiny.vlm()
    (free,) = generate(model, batch_of_one(2), **GREEDY)
    assert len(free.tokens) == 20 and not free.stopped
    stop = free.tokens[5]
    (answer,) = generate(model, batch_of_one(2), **{**GREEDY, "stop_ids": (stop, 0)})
    assert answer.tokens == free.tokens[: free.tokens.index(stop)] and answer.stopped
    assert len(answer.logps) == len(answer.tokens) + 1


@pytest.fixture
def decoded(monkeypatch):
    """The number of rows of every decode step."""
    rows = []

    def counting(model, tokens, cache):
        rows.append(len(tokens))
        return decode(model, tokens, cache)

    monkeypatch.setattr("model.generate.decode", counting)
    return rows


def test_finished_rows_leave_the_batch_and_the_others_go_on_unchanged(decoded):
    model = tiny.vlm()
    free = [answer.tokens for answer in generate(model, batch_of_all(), **GREEDY)]
    assert sum(decoded) == 4 * 19, "the last token of an answer is never read"
    decoded.clear()
    stop_ids = {free[0][2], free[2][9]}
    answers = generate(model, batch_of_all(), **{**GREEDY, "stop_ids": stop_ids})
    reads = 0  # tokens that had to be read to sample the next one
    for answer, tokens in zip(answers, free, strict=True):
        ends = [step for step, token in enumerate(tokens) if token in stop_ids]
        assert answer.stopped == bool(ends)
        assert answer.tokens == (tokens[: ends[0]] if ends else tokens)
        reads += min(len(answer.tokens), 19)
    assert sum(decoded) == reads < 4 * 19


def test_several_answers_per_prompt_read_the_prompt_once():
    model = tiny.vlm()
    prompts = []
    model.connector.register_forward_hook(lambda module, args, out: prompts.append(len(out)))
    answers = generate(model, batch_of_all(), **GREEDY, group_size=3)
    assert prompts == [4], "one call, over the four images"
    for index, answer in enumerate(generate(model, batch_of_all(), **GREEDY)):
        assert answers[3 * index : 3 * index + 3] == [answer] * 3


def test_sampled_answers_of_one_prompt_differ_and_a_seed_repeats_them():
    model = tiny.vlm()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {**GREEDY, "temperature": 1.0, "group_size": 4, "generator": generator}
        return [answer.tokens for answer in generate(model, batch_of_one(1), **options)]

    assert draw(1) == draw(1) != draw(2)
    assert len({tuple(tokens) for tokens in draw(1)}) == 4


def test_log_probabilities_are_those_of_a_full_forward_pass():
    model = tiny.vlm()
    generator = torch.Generator().manual_seed(0)
    banned = (tiny.IMAGE, 2)
    options = {**GREEDY, "temperature": 0.7, "top_p": 0.9, "banned": banned, "generator": generator}
    (answer,) = generate(model, batch_of_one(2), **options)
    whole = {**tiny.padded([PROMPTS[2] + answer.tokens]), "pixels": PIXELS[1:3]}
    with torch.no_grad():
        logits = model(whole, tiny.everywhere(whole))[len(PROMPTS[2]) - 1 : -1]
    for row, token, logp in zip(logits, answer.tokens, answer.logps, strict=True):
        assert math.log(reference(row, 0.7, 0.9, banned)[token]) == pytest.approx(logp, abs=1e-4)


def test_log_probabilities_of_sampling_are_those_of_scoring():
    """What RL rests on: with the same weights the ratio of the two is 1, at the end of an answer too."""
    model, sampling = tiny.vlm(), {"temperature": 0.7, "banned": (tiny.IMAGE, 2)}
    options = {**GREEDY, **sampling, "group_size": 2, "generator": torch.Generator().manual_seed(1)}
    stop = generate(model, batch_of_all(), **options)[0].tokens[3]
    answers = generate(model, batch_of_all(), **{**options, "stop_ids": {stop}})
    assert {answer.stopped for answer in answers} == {False, True}
    for row, answer in enumerate(answers):
        prompt, pixels = PROMPTS[row // 2], PIXELS.split(IMAGES)[row // 2]
        batch = tiny.flat([prompt + answer.tokens + [stop] * answer.stopped]) | ({"pixels": pixels} if len(pixels) else {})
        batch["labels"][:, :len(prompt)] = IGNORE
        with torch.no_grad():
            assert score(model, batch, **sampling).logps.tolist() == pytest.approx(answer.logps, abs=1e-4)


def reference(logits, temperature, top_p, banned) -> dict[int, float]:
    """The sampled distribution in plain Python: token -> probability."""
    weights = {token: math.exp(x / temperature) for token, x in enumerate(logits.tolist()) if token not in banned}
    ranked = sorted(weights, key=weights.get, reverse=True)
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for token in ranked:
        if mass < top_p:
            nucleus.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


@pytest.mark.parametrize("top_p", [1.0, 0.6, 0.8, 1e-6])
def test_samples_and_their_log_probabilities_come_from_one_distribution(top_p):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3)) * 2
    expected = reference(logits, 0.8, top_p, banned=(4,))
    generator = torch.Generator().manual_seed(0)
    tokens, logps = sample(logits.expand(20_000, 10), 0.8, top_p, (4,), generator)
    assert set(tokens.tolist()) <= set(expected)
    for token, probability in expected.items():
        drawn = tokens == token
        assert drawn.float().mean().item() == pytest.approx(probability, abs=0.015)  # 4 standard errors
        if drawn.any():
            assert logps[drawn].exp().tolist() == pytest.approx([probability] * int(drawn.sum()), abs=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 6400])
def test_a_token_is_drawn_where_the_sum_of_probabilities_passes_the_random_number(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = (4 * torch.randn(500, vocabulary, generator=generator)).softmax(-1)
    probabilities[:, 1:][torch.rand(500, vocabulary - 1, generator=generator) < 0.5] = 0.0
    tokens = draw(probabilities, torch.Generator().manual_seed(9))
    ends = probabilities.double().cumsum(-1)
    point = torch.rand(500, 1, generator=torch.Generator().manual_seed(9)).double() * ends[:, -1:]
    last, first = ends.gather(1, tokens[:, None]), (ends - probabilities.double()).gather(1, tokens[:, None])
    assert (first - 1e-6 <= point).all() and (point <= last + 1e-6).all()  # of the token that was drawn
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_a_temperature_or_a_share_that_makes_no_sense_is_refused(temperature, top_p):
    with pytest.raises(ValueError, match=f"not {temperature} and {top_p}"):
        sample(torch.zeros(1, 4), temperature, top_p, banned=(), generator=None)


def test_banned_tokens_are_never_sampled_at_any_temperature():
    logits = torch.zeros(5000, 6)
    logits[:, 3] = 50.0  # all but certain, were it allowed
    for temperature in (0.0, 1.0, 5.0):
        tokens, logps = sample(logits, temperature, 1.0, (tiny.IMAGE, 0), None)
        assert not {tiny.IMAGE, 0} & set(tokens.tolist())
        assert logps.isfinite().all()


def test_a_policy_that_loves_the_placeholder_writes_it_unless_it_is_banned():
    model = tiny.vlm()
    love = torch.zeros(50).index_fill(0, torch.tensor([tiny.IMAGE]), 30.0)
    model.llm.register_forward_hook(lambda module, args, logits: logits + love)
    options = {**GREEDY, "temperature": 1.0, "group_size": 5}
    assert any(tiny.IMAGE in answer.tokens for answer in generate(model, batch_of_all(), **options))
    answers = generate(model, batch_of_all(), **options, banned=(tiny.IMAGE,))
    assert not any(tiny.IMAGE in answer.tokens for answer in answers)


def test_temperature_zero_takes_the_likeliest_token_with_certainty():
    logits = torch.randn(7, 11)
    tokens, logps = sample(logits, 0.0, top_p=1.0, banned=(), generator=None)
    assert tokens.tolist() == logits.argmax(-1).tolist() and logps.tolist() == [0.0] * 7


@pytest.mark.parametrize("half", [False, True])
def test_bf16_weights_and_bf16_autocast_generate_too(half):
    model = tiny.vlm(qk_norm=True)
    batch = batch_of_all()
    if half:
        model, batch = model.bfloat16(), {**batch, "pixels": PIXELS.bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=not half):
        answers = generate(model, batch, **{**GREEDY, "temperature": 1.0}, banned=(tiny.IMAGE,))
    assert all(len(answer.tokens) == 20 and all(map(math.isfinite, answer.logps)) for answer in answers)


def test_under_autocast_keys_and_values_are_stored_as_attention_reads_them():
    model = tiny.vlm()
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = prefill(model, batch_of_all(), new_tokens=1)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert prefill(model, batch_of_all(), new_tokens=1)[1].keys.dtype == torch.float32


def test_generating_leaves_the_model_in_the_mode_it_was_in():
    model = tiny.vlm()
    for training in (True, False):
        model.train(training)
        generate(model, batch_of_one(0), **GREEDY)
        for _ in stream(model, batch_of_one(0), **GREEDY):
            break  # a stream left half-way restores it too
        assert model.training is training


def test_prompts_padded_on_the_left_or_packed_are_refused():
    model = tiny.vlm()
    left = {name: rows.flip(1) for name, rows in tiny.padded([PROMPTS[0], PROMPTS[0][:4]]).items()}
    for batch in (left, tiny.flat([PROMPTS[0], PROMPTS[0]])):
        with pytest.raises(ValueError, match="one document per row, padded on the right"):
            prefill(model, batch, new_tokens=1)


def test_more_tokens_than_the_model_has_positions_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="prompt of 14 tokens and 115 new ones exceed max_position_embeddings = 128"):
        generate(tiny.vlm(), batch_of_one(1), **{**GREEDY, "max_new_tokens": 115})
