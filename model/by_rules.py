"""Stage 3 by rules, on batches: how much better than expected each answer was, and what is minimised.

In:  micro-batches of answers that the policy sampled (dataset/rollouts.py: `micro_batches`), and their rewards (P, G).
Out: `ByRules`: `weighed`, the batches with an advantage and a weight for each learned token, and `minimised`, the policy's loss.

The formulas are in model/rl/policy.py. P problems, G answers to each. Of its K learned tokens a batch holds, each (K,):
    rollout_logps    when they were sampled           places       which answer of the update each belongs to
    advantages       one for all tokens of an answer; ppo: one for each, from the value head (model/rl/critic.py)
    weights          1; --per_sequence: see policy    reference_logps   under the model that the run began with, where beta > 0
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.generate import evaluating
from model.losses import IGNORE, next_token_targets
from model.reference import Start
from model.rl import policy
from model.rl.clipping import DynamicClipping
from model.rl.policy import ALGORITHMS, PolicyOptions
from model.runtime import Run


def policy_options(algo: str, advantage: str, clip_low: float | None, clip_high: float | None, per_sequence: bool,
                   **numbers: float | str) -> PolicyOptions:
    """An algorithm with what flags change of it; ValueError for an advantage or a KL that there is not, and for an idle flag."""
    known = ALGORITHMS[algo]
    if advantage not in ("", *policy.ADVANTAGES):
        raise ValueError(f"--advantage is one of {', '.join(policy.ADVANTAGES)}, not {advantage!r}")
    if advantage and known.advantage == "gae":
        raise ValueError(f"{algo} has its advantages from the value head: leave out --advantage")
    if numbers["kl"] not in policy.KL:
        raise ValueError(f"--kl is one of {', '.join(policy.KL)}, not {numbers['kl']!r}")
    if numbers["temperature"] <= 0:
        raise ValueError("--temperature is above 0: answers that are all alike teach nothing")
    idle = {"--drift": numbers["drift"] and known.loss != "cpgd", "--clip_low": clip_low is not None and known.loss == "cispo",
            "--lam": numbers["lam"] != PolicyOptions.lam and known.advantage != "gae",
            "--kl without --beta": numbers["kl"] != PolicyOptions.kl and not numbers["beta"]}
    if given := [flag for flag, unused in idle.items() if unused]:
        raise ValueError(f"--algo {algo} has no use for {', '.join(given)}")
    return dataclasses.replace(known, advantage=advantage or known.advantage, per_sequence=per_sequence or known.per_sequence,
                               clip_low=known.clip_low if clip_low is None else clip_low,
                               clip_high=known.clip_high if clip_high is None else clip_high, **numbers)


class ByRules:
    """A policy gradient, and the usual size of its steps, which it remembers.

    trained   what is called in training (Run.wrap); with a value head where advantages come from it
    start     the model that the run began with; None: beta is 0, there is no second model
    banned    tokens that the sampler never draws
    """

    def __init__(self, run: Run, trained: nn.Module, start: Start | None, options: PolicyOptions, banned: tuple[int, ...],
                 max_norm: float):
        self.run, self.trained, self.start, self.options, self.banned = run, trained, start, options, banned
        self.clip = DynamicClipping(max_norm, run.state.get("average", 0.0), run.state.get("skipped", 0))

    # ------------------------------------------------------------ before the first step on an update

    def weighed(self, batches: list[dict], rewards: Tensor, lengths: Tensor) -> list[dict]:
        """This rank's micro-batches of P x G answers, on the device, with all that the loss needs; rewards, lengths (P, G)."""
        batches, rewards = [self.run.to_device(batch) for batch in batches], rewards.to(self.run.device)
        if self.start:
            for batch in batches:
                batch["reference_logps"] = self.logps_at_start(batch)
            if self.options.kl == "k1":  # as a loss its gradient would be 0 on average
                rewards = rewards - self.options.beta * self.distances(batches, rewards)
        if self.options.advantage == "gae":
            self.by_value(batches, rewards.flatten())
        else:
            advantages = policy.ADVANTAGES[self.options.advantage](rewards).flatten()
            for batch in batches:
                batch["advantages"] = advantages[batch["places"]]
        weights = policy.per_sequence(lengths.flatten()).float() if self.options.per_sequence else torch.ones(lengths.numel())
        for batch in batches:
            batch["weights"] = weights.to(self.run.device)[batch["places"]]
        return batches

    @torch.no_grad()
    def logps_at_start(self, batch: dict) -> Tensor:
        """(K,): the log-probabilities of the learned tokens under the model that the run began with."""
        with self.start() as model, evaluating(model), self.run.autocast():
            return self.scored(model, batch)[0]

    def distances(self, batches: list[dict], rewards: Tensor) -> Tensor:
        """(P, G): what k1 estimates for each answer, those of the other ranks too."""
        found = {}
        for batch in batches:
            estimates = policy.k1(batch["rollout_logps"], batch["reference_logps"])
            for place in batch["places"].unique().tolist():
                found[place] = float(estimates[batch["places"] == place].sum())
        found = self.run.union(found)
        return rewards.new_tensor([found[k] for k in range(rewards.numel())]).view_as(rewards)

    @torch.no_grad()
    def by_value(self, batches: list[dict], rewards: Tensor) -> None:
        """ppo: advantages of every token from the value head, whitened over the update, the reward at the last token."""
        with self.run.autocast():
            for batch in batches:
                values = self.scored(self.trained, batch)[3]
                lengths = batch["places"].unique_consecutive(return_counts=True)[1]
                by_answer = pad_sequence(values.split(lengths.tolist()), batch_first=True)  # (answers, longest)
                given = torch.zeros_like(by_answer)
                given[torch.arange(len(lengths)), lengths - 1] = rewards[batch["places"].unique_consecutive()]
                real = torch.arange(by_answer.shape[1], device=values.device) < lengths[:, None]
                advantages, returns = policy.gae(given, by_answer, policy.DISCOUNT, self.options.lam)
                batch.update(values=values, advantages=advantages[real], returns=returns[real])
        found = torch.cat([batch["advantages"] for batch in batches]).double()
        count, total, squares = (self.run.sum(float(part)) for part in (len(found), found.sum(), found.square().sum()))
        mean = total / count
        deviation = max(0.0, squares / count - mean * mean) ** 0.5
        for batch in batches:
            batch["advantages"] = (batch["advantages"] - mean) / (deviation + 1e-8)

    # ------------------------------------------------------------ in every step

    def scored(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of K learned tokens: log-probability, entropy, which answer of the batch they are of, and value (ppo)."""
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        learned = targets != IGNORE
        found = model(batch, learned)
        logits, values = found if isinstance(found, tuple) else (found, None)
        logps, entropy = policy.scored(logits, targets[learned], self.banned, self.options.temperature)
        return logps, entropy, batch["document_ids"][learned], values

    def minimised(self, batch: dict) -> tuple[Tensor, dict, dict]:
        """The policy's loss, with the KL's and the value's, summed over the tokens; sums and largest values for the log."""
        options = self.options
        with self.run.autocast():
            logps, entropy, answers, values = self.scored(self.trained, batch)
        tokens = policy.Tokens(logps, batch["rollout_logps"], batch["advantages"], answers)
        losses, ratio = policy.TOKEN_LOSSES[options.loss](tokens, options)
        low, high = policy.clipped_shares(ratio, tokens.advantages, options)
        measured = {"entropy": entropy, "ratio": ratio, "clipped_low": low, "clipped_high": high}
        if self.start:
            measured["kl"] = policy.KL[options.kl](logps, batch["reference_logps"])
            if options.kl != "k1":
                losses = losses + options.beta * measured["kl"]
        if values is not None:
            measured["value_loss"] = policy.value_loss(values, batch["values"], batch["returns"], policy.VALUE_CLIP)
            losses = losses + policy.VALUE_WEIGHT * measured["value_loss"]
        loss = (batch["weights"] * losses).sum()
        sums = {name: float(values.detach().float().sum()) for name, values in measured.items()}
        gap = (logps.detach() - tokens.rollout).abs().max()
        return loss, {"loss": float(loss.detach()), **sums}, {"ratio_max": float(ratio.detach().max()), "logp_gap": float(gap)}

    def after(self, metrics: dict[str, float]) -> None:
        """Nothing: what is remembered of a step is remembered by `clip`."""

    @property
    def state(self) -> dict[str, float]:
        return self.clip.state
