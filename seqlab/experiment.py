"""A whole experiment: train, continue the sample prompts, and leave a report a person enjoys."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable

import jax

from seqlab.errors import SeqlabError
from seqlab.infer.generate import generate
from seqlab.infer.text import repeated
from seqlab.models.summary import table
from seqlab.parallel import processes
from seqlab.train.config import Config
from seqlab.train.held_out import held_out_text
from seqlab.train.loop import Outcome, train
from seqlab.train.metrics import read
from seqlab.train.report import write_report
from seqlab.train.watchdog import LIMITS, Limits

TEMPERATURE = 0.8  # of the samples


def run(
    config: Config,
    folder: pathlib.Path,
    *,
    say: Callable[[str], object] = print,
    limits: Limits = LIMITS,
) -> Outcome:
    """Train in `folder` (or go on there) and, when finished, write samples.txt and report.html.

    Of many processes the first writes them; for samples it holds all weights on one device.
    """
    outcome = train(config, folder, say=say, limits=limits)
    reported = processes.once(lambda: not outcome.trained and (folder / "report.html").exists())
    if outcome.finished and not reported:
        if config.samples:
            outcome = dataclasses.replace(outcome, model=processes.gathered(outcome.model))
        if processes.first():
            conclude(config, folder, outcome, say)
        processes.wait_for_all("the report")
    return outcome


def conclude(config: Config, folder: pathlib.Path, outcome: Outcome, say) -> None:
    """Write the samples and the report of a run that has finished."""
    samples = continue_prompts(config, outcome)
    baselines = compressed(config)
    say(verdict(folder, baselines))
    text = "\n\n".join(f"{s['prompt']}{s['text']}" for s in samples)
    try:
        (folder / "samples.txt").write_text(text + "\n", "utf-8")
        page = report(config, folder, outcome, samples, baselines)
        say(f"The report is in {page}")
    except Exception as error:  # the run itself is whole; its page can be written again
        say(f"The report could not be written ({type(error).__name__}: {error}).")


def continue_prompts(config: Config, outcome: Outcome) -> list[dict[str, str]]:
    """Each of the config's sample prompts with its continuation.

    To a model with a prefix a prompt is given as often as it takes to fill it.
    """
    samples, prefix, encode = [], outcome.model.prefix, outcome.tokenizer.encode
    for seed, prompt in enumerate(config.samples):
        read = repeated(prompt, encode, prefix) if prefix else prompt
        ids = outcome.tokenizer.prompt(read)
        try:
            tokens = generate(
                outcome.model,
                ids,
                steps=config.sample_tokens,
                temperature=TEMPERATURE,
                stop=outcome.tokenizer.stop,
                seed=seed,
            )
        except SeqlabError as error:
            samples.append({"prompt": prompt, "text": "", "note": str(error)})
            continue
        kept = [token for token in tokens.tolist() if token != outcome.tokenizer.stop]
        samples.append({"prompt": prompt, "text": outcome.tokenizer.decode(kept)})
    return samples


def compressed(config: Config) -> dict[str, float]:
    """Bits per byte that a general compressor needs for the held-out text."""
    text = held_out_text(config.data)
    return {"zlib -9": 8 * len(zlib.compress(text, 9)) / len(text)} if text else {}


def verdict(folder: pathlib.Path, baselines: dict[str, float]) -> str:
    """The last figure, held-out if there is one, beside the baselines, in one line."""
    last = {name: value for row in read(folder / "metrics.jsonl") for name, value in row.items()}
    held_out = "held_out_bits_per_byte" in last
    bits = last["held_out_bits_per_byte" if held_out else "bits_per_byte"]
    ours = f"{'held-out' if held_out else 'last step'} {bits:.3f} bits/byte"
    return ", ".join([ours, *(f"{name} {bits:.3f}" for name, bits in baselines.items())])


def report(config: Config, folder, outcome: Outcome, samples, baselines) -> pathlib.Path:
    """Write report.html and its pictures; returns the page's path."""
    return write_report(
        folder,
        title=folder.name,
        model_table=table(outcome.model),
        facts={"Compute dtype": str(outcome.model.dtype), "Device": jax.devices()[0].device_kind},
        samples=samples,
        baselines=baselines,
    )
