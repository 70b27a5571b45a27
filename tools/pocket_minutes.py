"""How long one seed of the preset `pocket` takes on this processor, before it is run: `python tools/pocket_minutes.py
[key=value ...]`. The tokens are those of `compassion-repro plan`; the speed is measured in two seconds.
"""

import sys
import time

from compassion_repro.core.errors import InputError
from compassion_repro.evaluation.judge_free import pairs_of
from compassion_repro.pipeline.plan import plan, shapes
from compassion_repro.presets import load_preset

SECONDS = 2  # of the measurement
SHARE = 0.6  # of a matrix product's speed that training reaches: 0.5 to 0.8 on two busy cores
BYTES_PER_TOKEN = 3  # of the pairs, in all their languages
STAGE_SECONDS = 5  # that a stage takes to load, merge and save a model of this size


def products_per_second(
    threads: int,  # processor threads
    rows: int,  # tokens of a micro-batch
    shape,  # `training.memory.Shape` of the base model
) -> float:  # floating-point operations a second
    "Speed of the model's own kind of matrix product, in 32 bits."
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(rows, shape.hidden), torch.randn(shape.hidden, shape.feed_forward)
    a @ b
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS:
        a @ b
        done += 1
    return done * 2 * a.numel() * b.shape[1] / spent


def operations(
    preset,  # `study.Preset`
    records: list[dict],  # from `plan`
    parameters: float,  # of the base model
) -> float:  # floating-point operations
    """Work of all stages: two operations a parameter and token forwards, and as many backwards through frozen
    weights; the pairs are only read, and held-out rows before and after a training.
    """
    trained = sum(record["tokens"] or 0 for record in records)
    held_out = sum(
        2 * section.held_out * section.length
        for record in records
        if (section := {"midtrain": preset.midtrain, "sft": preset.sft}.get(record["kind"]))
    )
    pairs = pairs_of(preset.margin.pairs)
    texts = [pair.question + pair.opening + way for pair in pairs for way in (pair.welfare, pair.neutral)]
    scored = sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN
    models = sum(record["kind"] == "probe" for record in records)
    return parameters * (4 * trained + 2 * held_out + 2 * scored * models)


def main():
    "Print the minutes of one seed; ends with a message where the base model is not at hand."
    preset = load_preset("pocket", sys.argv[1:])
    records, shape = plan(preset), shapes(preset)[0]
    if shape is None:
        sys.exit(f"{preset.models.base} is not at hand yet, so its size is not known")
    length, rows = preset.midtrain.length, preset.midtrain.micro_batch
    speed = products_per_second(preset.threads, rows * length, shape)
    work = operations(preset, records, shape.parameters)
    minutes = (work / (SHARE * speed) + STAGE_SECONDS * len(records)) / 60
    print(
        f"One seed of `pocket`: {len(records)} stages and {sum(r['tokens'] or 0 for r in records):,} trained"
        f" tokens, about {minutes:.0f} minutes here (a matrix product runs at {speed / 1e9:.0f} GFLOP/s now;"
        " other work on this machine lengthens it)."
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
