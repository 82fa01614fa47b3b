"""A Space that estimates the memory of a training step from a model's configuration: `hf_xent.planning.plan`."""

import json
import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

import gradio as gr
import pandas as pd

from hf_xent.planning import GPUS, plan

GIB = 2**30
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits")
COLORS = dict(zip(COMPONENTS, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677"), strict=True))
TRAININGS = ("all weights", "LoRA", "LoRA, base in 4 bits")
NAMES = ["stock", "TRL", "Liger", "cut-cross-entropy", "hf_xent"]
LOSS = "loss"  # the column that names the way in which the loss is computed
INTRODUCTION = """# How much memory does a training step take?

No weights are loaded: the model's own code runs on tensors that have shapes and no numbers, and every tensor is
counted. Compared are the stock step of Transformers, TRL's fused head, Liger, cut-cross-entropy and hf_xent, each at
the moment at which it takes the most. *fits* is the number of tokens in the largest batch that the GPU holds.
"""


def source_of(model: str, config: str | None):
    """What to plan for: the pasted config.json if there is one, else the model's name. Raises: ValueError."""
    if not (config or "").strip():  # an editor in which nothing is written has None
        return model.strip()
    try:
        return json.loads(config)
    except json.JSONDecodeError as error:
        raise ValueError(f"the pasted config.json is no JSON ({error}): paste the whole file") from error


def memory(
    model: str, config: str | None, tokens: float, gpu: str, **options
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """The peak memory of a training step.

    Args:
        model: A Hub id; not read if there is a config.
        config: The content of a config.json, if there is one.
        tokens: Tokens of a forward pass.
        gpu: A name in `hf_xent.planning.GPUS`, or its GB.
        **options: Further options of `hf_xent.planning.plan`.

    Returns:
        A table in GiB with a row for each way to compute the loss, the same with a row for each bar, and a line about
        the model and the source of the numbers.

    Raises:
        ValueError: The model has no configuration, or an option is out of its range.
    """
    found = plan(source_of(model, config), int(tokens), gpu=gpu, **options)
    rows = [
        {LOSS: peak.name, **{c: getattr(peak, c) / GIB for c in COMPONENTS}, "sum": peak.total / GIB}
        for peak in found.peaks
    ]
    table = pd.DataFrame(rows).round(2)
    bars = table.melt(LOSS, list(COMPONENTS), "component", "GiB")
    table["fits"] = [peak.largest_tokens for peak in found.peaks]
    million = f"{found.parameters / 1e6:,.1f} million parameters, {found.trained / 1e6:,.1f} million trained"
    return table, bars, f"{million}; sequences of {found.sequence_length} tokens. {found.source}"


def answer(*inputs):
    """What the button shows, of the inputs in their order on the page; an error is shown as one line."""
    model, config, tokens, dtype, training, optimizer, checkpointing, gpu = inputs
    adapters = training != "all weights"
    try:
        return memory(
            model,
            config,
            tokens,
            gpu,
            dtype=dtype,
            peft="lora" if adapters else None,
            four_bit=training.endswith("4 bits"),
            optimizer=optimizer,
            gradient_checkpointing=checkpointing,
        )
    except (ValueError, OSError) as error:
        raise gr.Error(str(error)) from error


def interface() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Memory of a training step", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            model = gr.Textbox("Qwen/Qwen3-0.6B", label="Model on the Hub")
            tokens = gr.Number(8192, label="Tokens of a batch", minimum=2, precision=0)
            gpu = gr.Dropdown(list(GPUS), value="H100", label="GPU", allow_custom_value=True, info="or a number of GB")
        with gr.Row():
            dtype = gr.Dropdown(["bf16", "fp16", "fp32"], value="bf16", label="Dtype")
            training = gr.Dropdown(
                ["all weights", "LoRA", "LoRA, base in 4 bits"], value="all weights", label="Training"
            )
            optimizer = gr.Dropdown(["adamw", "adamw_8bit", "sgd", "adafactor"], value="adamw", label="Optimizer")
            checkpointing = gr.Checkbox(False, label="Gradient checkpointing")
        with gr.Accordion("Or paste a config.json", open=False):
            config = gr.Code(language="json", label="config.json")
        button = gr.Button("Estimate", variant="primary")
        table = gr.Dataframe(label="GiB at the peak", interactive=False)
        bars = gr.BarPlot(
            x=LOSS, y="GiB", color="component", color_map=COLORS, label="GiB at the peak", sort=NAMES, x_title=" "
        )
        line = gr.Markdown()
        inputs = [model, config, tokens, dtype, training, optimizer, checkpointing, gpu]
        button.click(answer, inputs, [table, bars, line], api_name="memory")
    return page


if __name__ == "__main__":
    interface().launch()
