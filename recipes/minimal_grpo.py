"""Multi-objective GRPO in one readable file: `python recipes/minimal_grpo.py`.

The whole method on top of `equipoise.functional`, without the package's samplers, runs and configs: a tiny language
model over forty words learns to be helpful AND polite. The two objectives conflict, because a reply has eight words
and each polite word takes the place of a useful one. No network, no files, 15 seconds on two cores.

Read it top to bottom: world, rewards, sampling, log-probabilities, training. To use a real model, replace `build_world`
by `AutoModelForCausalLM.from_pretrained(...)` and its tokenizer; the rest stays as it is.

Shape suffixes: P prompts, G completions per prompt, B = P*G rows, S prompt tokens, T completion tokens, K objectives.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.functional import clipped_policy_loss, combine_objectives, kl_estimate, kl_loss_term, selected_logprobs

# -- the world: prompts name a job, useful words belong to that job --------------------------------------------------

PAD, EOS = 0, 1
POLITE = ["please", "thanks", "kindly", "gladly", "welcome"]
JOBS = {
    "bake": ["flour", "sugar", "oven", "butter", "stir", "knead"],
    "garden": ["soil", "seeds", "water", "plant", "prune", "sunlight"],
    "repair": ["pump", "tyre", "wrench", "chain", "oil", "brake"],
    "paint": ["brush", "canvas", "colour", "primer", "easel", "varnish"],
}
FILLER = ["the", "and", "of", "a", "very", "thing", "stuff", "maybe", "well", "so"]
WORDS = ["<pad>", "<eos>", "how", "to", *JOBS, *POLITE, *(word for job in JOBS.values() for word in job), *FILLER]
ID = {word: index for index, word in enumerate(WORDS)}
OBJECTIVES = ("helpfulness", "politeness")


def build_world(seed: int) -> LlamaForCausalLM:
    """A random language model of about 100,000 parameters; in your project, a pretrained one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def prompts_of_step(step: int, num_prompts: int) -> list[str]:
    """Jobs in turn; real runs shuffle a data set."""
    jobs = list(JOBS)
    return [jobs[(step * num_prompts + index) % len(jobs)] for index in range(num_prompts)]


# -- rewards: one column per objective, higher is better, each in [0, 1] ---------------------------------------------


def score(jobs: list[str], completions: list[list[str]]) -> Tensor:
    """Utilities [B, K]. NaN would mean "not scored": never put 0 for a reward that failed."""
    rows = []
    for job, words in zip(jobs, completions, strict=True):
        helpful = len(set(words) & set(JOBS[job])) / len(JOBS[job])  # different useful words, so repeating pays nothing
        polite = min(1.0, sum(word in POLITE for word in words) / 4)
        rows.append([helpful, polite])
    return torch.tensor(rows, dtype=torch.float64)


# -- sampling: G completions per prompt, no cache for the sake of clarity --------------------------------------------


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompt_ids_BS: Tensor, max_tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Completion ids [B, T] and their mask: True up to and including the EOS, which is trained on; padding is not."""
    ids_BL = prompt_ids_BS
    alive_B = torch.ones(len(ids_BL), dtype=torch.bool)
    masks = []
    for _ in range(max_tokens):
        logits_BV = model(input_ids=ids_BL).logits[:, -1].float()
        tokens_B = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)
        tokens_B = torch.where(alive_B, tokens_B, PAD)
        masks.append(alive_B.clone())
        ids_BL = torch.cat([ids_BL, tokens_B[:, None]], dim=1)
        alive_B &= tokens_B != EOS
    return ids_BL[:, prompt_ids_BS.shape[1] :], torch.stack(masks, dim=1)


def completion_logprobs(model: LlamaForCausalLM, prompt_ids_BS: Tensor, completion_ids_BT: Tensor) -> Tensor:
    """Log-probability of every completion token given what stands before it: [B, T].

    The prompts here have equal length; with left padding, pass attention_mask and position_ids as well.
    """
    logits_BLV = model(input_ids=torch.cat([prompt_ids_BS, completion_ids_BT], dim=1)).logits
    first = prompt_ids_BS.shape[1]
    return selected_logprobs(logits_BLV[:, first - 1 : -1], completion_ids_BT)


# -- training --------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train from scratch; returns the mean reward per objective at the first and over the last ten steps."""
    policy = build_world(arguments.seed)
    reference = copy.deepcopy(policy).requires_grad_(False)  # what the KL term keeps the policy close to
    optimizer = torch.optim.AdamW(policy.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(arguments.seed)
    weights_K = torch.tensor(arguments.weights, dtype=torch.float64)
    history: list[list[float]] = []

    for step in range(arguments.steps):
        # 1. Sample a group of completions for every prompt. Groups are explicit ids, not equal prompt texts.
        jobs = prompts_of_step(step, arguments.prompts)
        group_ids_B = torch.arange(arguments.prompts).repeat_interleave(arguments.group_size)
        jobs_B = [jobs[group] for group in group_ids_B.tolist()]
        prompt_ids_BS = torch.tensor([[ID["how"], ID["to"], ID[job]] for job in jobs_B])
        completion_ids_BT, mask_BT = sample(policy, prompt_ids_BS, arguments.max_tokens, generator)

        # 2. Score every completion on every objective.
        words = [
            [WORDS[token] for token, real in zip(row, keep, strict=True) if real and token != EOS]
            for row, keep in zip(completion_ids_BT.tolist(), mask_BT.tolist(), strict=True)
        ]
        rewards_BK = score(jobs_B, words)
        history.append(rewards_BK.mean(dim=0).tolist())

        # 3. What beats its own group's mean is reinforced: no critic. `method` is where ways to combine differ.
        advantages_B = combine_objectives(rewards_BK, group_ids_B, weights_K, method=arguments.method).float()

        # 4. One step on the clipped surrogate plus beta times the KL term. On-policy the ratio is 1 and its gradient
        #    is REINFORCE's; with several passes over a rollout, old_logprobs are those from before the first.
        logprobs_BT = completion_logprobs(policy, prompt_ids_BS, completion_ids_BT)
        old_logprobs_BT = logprobs_BT.detach()
        with torch.no_grad():
            ref_logprobs_BT = completion_logprobs(reference, prompt_ids_BS, completion_ids_BT)
        kl_BT = kl_loss_term(logprobs_BT, old_logprobs_BT, ref_logprobs_BT, mask=mask_BT)
        loss, _ = clipped_policy_loss(
            logprobs_BT, old_logprobs_BT, advantages_B, mask_BT, kl_BT=kl_BT, beta=arguments.beta
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

        if step % 25 == 0 or step + 1 == arguments.steps:
            k1_BT = kl_estimate(logprobs_BT.detach(), ref_logprobs_BT)
            kl = float(torch.where(mask_BT, k1_BT, 0.0).sum(dim=1).mean())
            shown = "  ".join(f"{name} {value:.2f}" for name, value in zip(OBJECTIVES, history[-1], strict=True))
            print(f"step {step:4d}  {shown}  kl {kl:5.2f}  e.g. how to {jobs_B[0]}: {' '.join(words[0])}")

    last = torch.tensor(history[-10:]).mean(dim=0).tolist()
    return history[0], last


def main() -> None:
    """Parse arguments, train, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--group-size", type=int, default=16, help="completions per prompt")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--beta", type=float, default=0.005, help="weight of the KL term")
    parser.add_argument("--weights", type=float, nargs=2, default=[1.0, 1.0], metavar=OBJECTIVES)
    parser.add_argument("--method", default="weighted_sum", help="weighted_sum or gdpo")
    parser.add_argument("--seed", type=int, default=0)
    first, last = train(parser.parse_args())
    for name, before, after in zip(OBJECTIVES, first, last, strict=True):
        print(f"{name}: {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
