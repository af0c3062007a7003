"""`vlmalign answer`: one question about films, or about none, to a checkpoint; the answer is printed as it is decoded."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument("question", metavar="QUESTION", help="what to ask, in quotes")
    parser.add_argument(
        "--image",
        dest="images",
        metavar="FILM",
        type=Path,
        action="append",
        default=[],
        help="an image that the question is about; give the option again for more",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, help="PEFT folder, or a stage's folder of a run, on this checkpoint"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=512, help="longest answer (512)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="of sampling; 0, the default: the likeliest token"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling at a temperature above 0")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as the model was saved"
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer; ValueError, before any weight is read, for a folder, an adapter or a film that cannot be used."""
    if arguments.max_tokens < 1 or not arguments.temperature >= 0:
        raise ValueError(
            f"--max-tokens must be >= 1 and --temperature >= 0, found {arguments.max_tokens} and {arguments.temperature:g}"
        )
    from vlmalign.answering.stream import TextStream
    from vlmalign.api.checkpoint import open_front
    from vlmalign.api.question import question

    front = open_front(arguments.checkpoint, arguments.adapter)
    if arguments.images and front.pixels is None:
        raise ValueError(
            f"{arguments.checkpoint} is a text model ({front.config.family}), which sees no images; leave out --image, "
            "or give a vision-language checkpoint"
        )
    messages = question(arguments.question, images=arguments.images, system=arguments.system)
    prompt = front.chat.prompt(messages)
    if front.pixels is not None:
        front.pixels.read(list(prompt.images))  # a damaged film is found out now, not when the model has been loaded
    _say(
        f"loading {arguments.checkpoint} ({front.config.family}{'' if front.adapter is None else ', with its adapter'})"
    )
    model = front.load(dtype=arguments.dtype)
    _say("compiling; the first words take longest")
    # Spaces as the tokens have them: tidied up, the text of more tokens need not begin with that of fewer.
    decode = partial(model.chat.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stream = TextStream(lambda tokens: decode(tokens.tolist()), _write)
    ((answer,),) = model.sample(
        [prompt],
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        watch=lambda prompt, sample, tokens: stream.show(tokens),
    )
    stream.end(answer.tokens)
    if not answer.stopped:
        _say(f"cut off after {arguments.max_tokens} tokens; --max-tokens sets the limit")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    """About the answer, not of it: so that the answer alone goes into a file or a pipe."""
    print(text, file=sys.stderr, flush=True)
