"""`python -m benchmarks`, run in the root of the repository: measurements beyond `hf-xent bench`, and their pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from benchmarks import caches, compression, dpo, first_gpu, memory, roofline, tails, top_k
from benchmarks import kernels as compilation
from hf_xent.bench import inputs
from hf_xent.bench.config import BenchConfig
from hf_xent.cli.options import Model, Text
from hf_xent.models.packaged import PACKAGED

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def curves(
    output: Annotated[Path, Option(help="The JSON file to write.")] = tails.FILE,
    data: Text = "pydoc",
    tokens: Annotated[int, Option(help="Number of tokens.", min=max(tails.CHUNKS))] = 2044,
) -> None:
    """Measure the tail curves of the packaged models, to which `calibrated` inputs are fitted."""
    configs = {name: BenchConfig(model=name, data=data, tokens=tokens, device="cpu") for name in PACKAGED}
    entries = {name: tails.measure(name, data, inputs.activations(config)) for name, config in configs.items()}
    output.write_text(tails.text(entries) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command("first-gpu")
def first_gpu_page(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/h200.md"),
) -> None:
    """Make the page of the first measurements on a GPU from their raw lines."""
    output.write_text(first_gpu.page(), encoding="utf-8")
    print(f"written: {output}")


@app.command()
def tail(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/tail.md"),
    data: Text = "pydoc",
    tokens: Annotated[int, Option(help="Number of tokens.", min=1)] = 1024,
) -> None:
    """Compare the gradient error of the sparse tail on the packaged models with dropping the tail and with bfloat16."""
    configs = [BenchConfig(model=name, data=data, tokens=tokens, device="cpu") for name in PACKAGED]
    output.write_text(compression.page(configs), encoding="utf-8")
    print(f"written: {output}")


@app.command(name="objectives")
def costs(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/objectives.md"),
    model: Model = "smollm2",
    data: Text = "pydoc",
    tokens: Annotated[int, Option(help="Number of tokens.", min=1)] = 512,
    repeats: Annotated[int, Option(help="Rounds.", min=1)] = 5,
) -> None:
    """Measure the time and memory of EMO, NoiseFiT and other objectives relative to cross-entropy."""
    from benchmarks import objectives  # lazy: trainers import transformers' Trainer with its dependencies

    config = BenchConfig(model=model, data=data, tokens=tokens, repeats=repeats, device="cpu")
    output.write_text(objectives.page(config), encoding="utf-8")
    print(f"written: {output}")


@app.command(name="caches")
def teacher_caches(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = caches.FILE,
    model: Model = "smollm2",
    data: Text = "pydoc",
    documents: Annotated[int, Option(help="Number of documents.", min=1)] = 4,
    length: Annotated[int, Option(help="Tokens of a document.", min=2)] = 128,
    noise: Annotated[float, Option(help="Noise in the student's weights, relative to their size.", min=0.0)] = 0.1,
) -> None:
    """Measure the size of a teacher's caches per token, and what their form does to loss and gradient."""
    output.write_text(caches.page(model, data, documents, length, noise), encoding="utf-8")
    print(f"written: {output}")


@app.command(name="kv-caches")
def caches_of_keys_and_values(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/kv-caches.md"),
    model: Model = "smollm2",
    data: Text = "pydoc",
    tokens: Annotated[int, Option(help="Tokens of the cache whose memory is measured.", min=1)] = 4096,
    contexts: Annotated[str, Option(help="Tokens before the timed ones, separated by commas.")] = "256,1024,4096",
    rounds: Annotated[int, Option(help="Blocks of timed tokens.", min=1)] = 3,
) -> None:
    """Measure bytes, memory and time of caches of keys and values that hold fewer bits."""
    from benchmarks import kv_caches  # lazy: transformers

    lengths = [int(context) for context in contexts.split(",")]
    output.write_text(kv_caches.page(model, data, tokens, lengths, rounds) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command(name="top-k")
def top_k_losses(
    model: Model = "smollm2",
    data: Text = "pydoc",
    tokens: Annotated[int, Option(help="Number of tokens.", min=1)] = 1024,
    k: Annotated[int, Option(help="Tokens of the teacher at every position.", min=1)] = 64,
    repeats: Annotated[int, Option(help="Rounds.", min=1)] = 3,
) -> None:
    """Measure distillation against a teacher's k most probable tokens beside cross-entropy and dense torch."""
    print(top_k.table(BenchConfig(model=model, data=data, tokens=tokens, repeats=repeats, device="cpu"), k))


@app.command(name="classifiers")
def classifier_steps(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/classifiers.md"),
    encoder: Annotated[str | None, Option(help="Path or Hub id of an encoder of text; none by default.")] = None,
    rounds: Annotated[int, Option(help="Turns of each trainer.", min=1)] = 5,
    steps: Annotated[int, Option(help="Steps of a turn, of which the first two are not timed.", min=3)] = 12,
) -> None:
    """Measure a step of ClassTrainer under several losses beside that of transformers' Trainer."""
    from benchmarks import classifiers  # lazy: transformers' Trainer with its dependencies

    output.write_text(classifiers.page(encoder, rounds, steps) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command(name="adaptation")
def adaptation_costs(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/adaptation.md"),
    rounds: Annotated[int, Option(help="Rounds of each method.", min=1)] = 9,
) -> None:
    """Measure what adaptation at test time adds to a forward pass of the same batch."""
    from benchmarks import adaptation  # lazy: transformers' models

    output.write_text(adaptation.page(rounds) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command(name="callbacks")
def callback_costs(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/callbacks.md"),
    rounds: Annotated[int, Option(help="Turns of each arm.", min=1)] = 9,
    steps: Annotated[int, Option(help="Steps of a turn, an even number; the first two are not timed.", min=4)] = 42,
    every: Annotated[int, Option(help="Steps between two evaluations of the geometry.", min=1)] = 500,
) -> None:
    """Measure what CurveCallback and GeometryCallback add to the training of a small GPT-2."""
    from benchmarks import callbacks  # lazy: transformers' Trainer with its dependencies

    output.write_text(callbacks.page(rounds, steps, every) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command(name="attacks")
def attack_costs(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/attacks.md"),
    rounds: Annotated[int, Option(help="Turns of each contestant.", min=1)] = 5,
    steps: Annotated[int, Option(help="Steps of an attack.", min=1)] = 40,
    epsilon: Annotated[float, Option(help="Of a pixel, where rows flip.")] = 0.1,
) -> None:
    """Measure attacks beside a plain loop of forward and backward passes, and what rows that leave early save."""
    from benchmarks import attacks  # lazy: transformers with its dependencies

    output.write_text(attacks.page(rounds, steps, epsilon) + "\n", encoding="utf-8")
    print(f"written: {output}")


@app.command(name="dpo")
def dpo_step(
    model: Model = "smollm2",
    pairs: Annotated[int, Option(help="Pairs in the batch.", min=1)] = 8,
    tokens: Annotated[int, Option(help="Tokens of prompt and answer.", min=2)] = 256,
    prompt: Annotated[int, Option(help="How many of these tokens belong to the prompt.", min=1)] = 64,
    rounds: Annotated[int, Option(help="Timed steps of each side.", min=1)] = 5,
) -> None:
    """Measure memory and time of one DPO step of TRL's trainer and of the patched one, each in its own process."""
    print(dpo.table(dpo.run(dpo.Shape(model, pairs, tokens, prompt), rounds)))


@app.command(name="memory")
def memory_by_tokens(
    tokens: Annotated[str, Option(help="Numbers of tokens to measure, such as '512,1024'; none only draws.")] = "",
    file: Annotated[Path, Option(help="The CSV file that keeps what was measured.")] = memory.FILE,
    picture: Annotated[Path, Option(help="The picture; its name gets '-light' and '-dark'.")] = memory.PICTURE,
) -> None:
    """Measure the peak memory of the loss against the number of tokens, and draw it for the first page."""
    for number in filter(None, tokens.split(",")):
        memory.add(memory.measure(int(number)), file)
    print("written:", *memory.draw(file, picture))


@app.command(name="roofline")
def roofline_page(output: Annotated[Path, Option(help="The Markdown file to write.")] = roofline.FILE) -> None:
    """Estimate the time and memory of this and other designs on four GPUs, beside what was measured on one of them."""
    output.write_text(roofline.page(), encoding="utf-8")
    print(f"written: {output}")


@app.command(name="retrieval")
def grids_of_losses(
    folder: Annotated[Path, Option(help="The folder of examples/loss_retrieval.py: prompts in en and fr.")],
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/retrieval.md"),
    model: Model = "smollm2",
    sources: Annotated[int, Option(help="Number of sources.", min=1)] = 3,
    pairs: Annotated[int, Option(help="Pairs of each source that are read alone.", min=1)] = 24,
) -> None:
    """Measure a grid of losses with a shared source against every pair alone: CPU seconds and memory."""
    from benchmarks import retrieval  # lazy: it needs the examples beside it

    output.write_text(retrieval.page(folder, model, sources, pairs), encoding="utf-8")
    print(f"written: {output}")


@app.command()
def kernels(
    output: Annotated[Path, Option(help="The Markdown file to write.")] = Path("benchmarks/results/kernels.md"),
) -> None:
    """Compile every kernel variant for GPUs that need not be there, and list registers, spills and shared memory."""
    output.write_text(compilation.page(), encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
