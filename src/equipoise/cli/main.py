"""`equipoise`: arguments, exit codes, and one message for what goes wrong. The work is imported by the command."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli.thread_waits import choose_waits
from equipoise.errors import EquipoiseError

app = typer.Typer(
    name="equipoise",
    help="Align language models to objectives that conflict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
Prompts = Annotated[str, typer.Option("--prompts", help="Prompts: JSONL(.gz), CSV, Parquet, directory or hub name.")]
Judge = Annotated[str, typer.Option("--judge", help="Reward model directory, `package.module:function` or `sandbox`.")]
Weights = Annotated[str | None, typer.Option("--weights", help="Weights of the combined score: a=1,b=0.5.")]
Ask = Annotated[str | None, typer.Option("--ask", help="Weights to ask a conditioned policy for: a=0.7,b=0.3.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Completions per prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest completion, EOS included.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """`--debug` is taken out of the arguments in `run`; it is declared here so that --help shows it."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Output directory.")] = Path("runs/quickstart"),
    seed: Seed = 0,
    size: Annotated[str, typer.Option("--size", help="Policy: 1m, 4m or 16m parameters.")] = "1m",
    full: Annotated[bool, typer.Option("--full", help="Also make the controls that take long.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Methods trained at once; default: 2 where cores and memory (4 GiB) allow, else 1."
        ),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", hidden=True)] = None,
) -> None:
    """The whole method in minutes, without a network: train, align, judge and report on an embedded sandbox."""
    from equipoise.cli.quickstart import quickstart as run_it

    run_it(out, seed, size, full, workers, only)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; default: the recipe's, else runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
) -> None:
    """Train what a recipe says: sft, reward, grpo, ppo or dpo."""
    from equipoise.cli.train import end_processes, train_recipe

    try:
        train_recipe(recipe, overrides or [], out, resume)
    finally:
        end_processes()


@app.command()
def score(
    reward_model: Annotated[str, typer.Argument(help="A reward model directory.")],
    data: Annotated[str, typer.Argument(help="Rows with prompt and response.")],
    out: Out,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Responses scored at once.")] = 32,
) -> None:
    """Score responses: every row gains `predicted`, a number per aspect on its native scale."""
    from equipoise.cli.inference import score_file

    score_file(reward_model, data, out, batch_size)


@app.command()
def generate(
    policy: Annotated[str, typer.Argument(help="A policy: directory, adapter or hub name.")],
    prompts: Prompts,
    out: Out,
    group_size: Annotated[int, typer.Option("--group-size", min=1, help="Completions per prompt.")] = 1,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    ask: Ask = None,
) -> None:
    """Sample completions of prompts."""
    from equipoise.cli.inference import generate_file

    generate_file(policy, prompts, out, group_size, temperature, max_tokens, seed, ask)


@app.command()
def pairs(
    source: Annotated[str, typer.Argument(help="A policy (with --prompts), or data with several responses a prompt.")],
    reward: Annotated[
        str, typer.Option("--reward", help="Reward model directory, `package.module:function` or `sandbox`.")
    ],
    out: Out,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts to sample responses to.")] = None,
    weights: Weights = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=2, help="Responses sampled per prompt; default 8.")
    ] = None,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Most pairs per prompt.")] = 1,
    min_margin: Annotated[
        float, typer.Option("--min-margin", min=0.0, help="Least difference in combined utility.")
    ] = 0.0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Of the sampling; default 1.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest response, EOS included; default 128.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampling; default 0.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Sample until generated_tokens=N, flops=N or seconds=N are spent: prompts in random order."
        ),
    ] = None,
) -> None:
    """Build preference pairs for DPO: per prompt the best response against the worst, by a reward model."""
    from equipoise.cli.pairs import PairOptions, pairs_command, parse_budget

    drawn = (prompts, group_size, per_prompt, min_margin, temperature, max_tokens, seed, parse_budget(budget))
    pairs_command(source, out, PairOptions(reward, weights, *drawn))


@app.command()
def evaluate(
    policy: Annotated[str, typer.Argument(help="A policy: directory, adapter or hub name.")],
    prompts: Prompts,
    judge: Judge,
    out: Out,
    reference: Annotated[str | None, typer.Option("--reference", help="Policy to measure the KL to.")] = None,
    weights: Weights = None,
    samples: Samples = 1,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    ask: Ask = None,
) -> None:
    """Judge a policy on prompts: a table per aspect and prompt kind, with intervals."""
    from equipoise.cli.evaluate import EvaluationOptions, evaluate_command

    options = EvaluationOptions(prompts, judge, weights, samples, temperature, max_tokens, seed, ask)
    evaluate_command(policy, out, reference, options)


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=RUN_DIR ..., a repeated NAME another seed; or a study: RECIPE.yaml [key.sub=value ...]"
        ),
    ] = None,
    *,
    out: Out,
    base: Annotated[str | None, typer.Option("--base", help="The policy that runs are compared with.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts, as for evaluate.")] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Reward model directory, `package.module:function` or `sandbox`.")
    ] = None,
    weights: Weights = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions per prompt; default 1.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="Default 1; 0 is greedy.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest completion, EOS included; default 128.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampling; default 0.")] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Of a study: these sizes only, as in 1m,4m.")] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Of a study: jobs at a time; they share the cores."),
    ] = None,
    job: Annotated[str | None, typer.Option("--job", hidden=True, help="One job of the study in --out.")] = None,
) -> None:
    """Compare runs with a base policy on the same prompts, with intervals and costs; or train and compare methods.

    A study trains every method of a recipe on the same reward model, prompts, base policy and budget, and goes on
    where it stopped.
    """
    from equipoise.cli.compare import CompareOptions, compare_command

    of_runs = (base, prompts, judge, weights, samples, temperature, max_tokens, seed)
    compare_command(runs or [], CompareOptions(out, *of_runs, sizes, workers, job))


@app.command()
def soup(
    models: Annotated[list[str], typer.Argument(help="Run directories, or LoRA adapters or full models of one base.")],
    weights: Annotated[str, typer.Option("--weights", help="A share for each, summing to 1: 0.5,0.3,0.2.")],
    out: Out,
    merge: Annotated[bool, typer.Option("--merge", help="Of adapters, write a full model.")] = False,
) -> None:
    """Interpolate the weights of policies exactly (rewarded soups): an adapter of summed rank, or a full model."""
    from equipoise.cli.soup import soup_command

    soup_command(models, weights, out, merge)


@app.command()
def pareto(
    recipe: Annotated[list[str] | None, typer.Argument(help="A GRPO recipe.yaml [key.sub=value ...]")] = None,
    *,
    out: Out,
    points: Annotated[int | None, typer.Option("--points", min=2, help="Weights to train: about so many.")] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="After the corners, train where the front's gap is widest.")
    ] = False,
    soups: Annotated[
        bool, typer.Option("--soups", help="Judge soups of the corners' models at the same weights too.")
    ] = False,
    conditioned: Annotated[
        str | None,
        typer.Option("--conditioned", help="Run or model of a conditioned policy, judged at the same weights too."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Held-out prompts; default: of the recipe's evaluation.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="As for evaluate; default: the recipe's evaluation's, or its scorers."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions per prompt judged.")] = None,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Points at a time; they share the cores.")] = 1,
    job: Annotated[str | None, typer.Option("--job", hidden=True, help="One job of the sweep in --out.")] = None,
) -> None:
    """Train a recipe at many weights of its objectives and show the front; goes on where it stopped."""
    from equipoise.cli.pareto import SweepOptions, pareto_command

    measured = (prompts, judge, samples, seed, conditioned)
    options = None if points is None else SweepOptions(points, adaptive, soups, *measured)
    pareto_command(recipe or [], out, options, workers, job)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A quickstart, comparison, sweep, evaluation or run directory.")],
) -> None:
    """Write report.html, which opens in any browser without a network, and figures/*.png into a directory."""
    from equipoise.cli.report import report_command

    report_command(directory)


@app.command()
def validate(
    target: Annotated[str, typer.Argument(help="A recipe (.yaml) or data.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ..., for a recipe.")] = None,
) -> None:
    """Check a recipe or data file and say what it holds; nothing is trained."""
    from equipoise.cli.validate import validate_target

    validate_target(target, overrides or [])


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.1, help="GB of one GPU: 24, 80, 141; default: this machine's.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", help="config.json of a model that is not here: FILE, or NAME=FILE for another one."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Longest prompt; default: the recipe's limit.")
    ] = None,
    completion_tokens: Annotated[
        int | None, typer.Option("--completion-tokens", min=1, help="Longest completion; default: the recipe's limit.")
    ] = None,
    flops: Annotated[float | None, typer.Option("--flops", help="FLOP/s of products; default: measured.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="Bytes/s; default: measured.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a recipe fits a GPU or this machine, what takes the memory, and what to change; nothing is loaded."""
    from equipoise.cli.plan import PlanOptions, plan_command
    from equipoise.studies.planning import Lengths

    lengths = Lengths(prompt_tokens, completion_tokens)
    options = PlanOptions(memory, tuple(config or ()), lengths, flops, bandwidth, as_json)
    plan_command(recipe, overrides or [], options)


sandbox = typer.Typer(help="The embedded world: prompts, responses, ratings, small models.", no_args_is_help=True)
app.add_typer(sandbox, name="sandbox")


@sandbox.callback()
def _sandbox() -> None:
    """Keeps `export` a subcommand while it is the only one."""


@sandbox.command()
def export(directory: Annotated[Path, typer.Argument(help="A new or empty directory.")]) -> None:
    """Write the sandbox as ordinary data files."""
    from equipoise.sandbox.export import export_sandbox

    for name, rows in export_sandbox(directory).items():
        print(f"{directory / name}: {rows} rows")


def run() -> None:
    """Entry point: 0 done; 1 a fault while running; 2 the input is wrong; 130/143 interrupted or terminated."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _set_up_logging()
    choose_waits()
    try:
        app(standalone_mode=True)
    except EquipoiseError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(
            f"{type(error).__name__}: {error}\nThis is a fault, not a wrong input; --debug shows where it happened.",
            every_rank=True,
        )
        sys.exit(1)


def _set_up_logging() -> None:
    """Warnings of Equipoise go to stderr; the libraries' own progress bars and chatter stay quiet."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("equipoise")
    logger.handlers = [handler]
    # Every rank reads the same data and would say the same about it.
    logger.setLevel(logging.INFO if _rank() == "0" else logging.ERROR)
    logger.propagate = False


def _say(message: str, *, every_rank: bool = False) -> None:
    """To stderr, once: the other ranks of a distributed run have the same to say, unless one of them broke alone."""
    if _rank() == "0":
        print(f"equipoise: {message}", file=sys.stderr, flush=True)
    elif every_rank:
        print(f"equipoise (process {_rank()}): {message}", file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK", "0")
