"""The tokenizer, chat template and image rule of a folder; each check adds what is wrong to `problems`, one line each."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from vlmalign.data.chat.chat import Chat, open_chat, read_stop_ids
from vlmalign.data.chat.template import MARKER, reads_the_clock
from vlmalign.data.films.pixels import open_pixels
from vlmalign.inspection.records import Text
from vlmalign.models.config import ModelConfig, QwenVisionConfig, SiglipConfig
from vlmalign.weights.layout import read_json

#: settings whose `auto_map` would have transformers run code that came with the folder
TOKENIZER_SETTINGS = ("tokenizer_config.json",)
IMAGE_SETTINGS = ("processor_config.json", "preprocessor_config.json")
GENERATION = "generation_config.json"

#: the smallest training example
CONVERSATION = [{"role": "user", "content": "Is the heart large?"}, {"role": "assistant", "content": "No."}]


def one_line(error: Exception, folder: Path) -> str:
    """What an error says, without the folder's name and line breaks."""
    return " ".join(str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder} ").split())


def read_text(folder: Path, config: ModelConfig | None, problems: list[str], notes: list[str]) -> Text | None:
    """The tokenizer's side, or None when there is no tokenizer that can be opened."""
    if _asks_for_code(folder, TOKENIZER_SETTINGS, problems):
        return None
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append("no tokenizer (tokenizer.json with tokenizer_config.json): copy it from the original model")
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # libraries raise bare exceptions here; whatever it is belongs in the report
        problems.append(f"the tokenizer cannot be opened: {one_line(error, folder)}")
        return None
    if config is not None:
        _check_vocabulary(tokenizer, config.decoder.vocab, problems)
    stops: tuple[int, ...] = ()
    try:
        stops = read_stop_ids(folder, tokenizer)
        unknown = [id for id in stops if tokenizer.convert_ids_to_tokens(id) is None]
        if unknown:
            problems.append(
                f"{GENERATION} names stop ids that the tokenizer does not have ({', '.join(map(str, unknown))}): "
                "copy both from the original model"
            )
    except ValueError as error:
        problems.append(f"{one_line(error, folder)}: set eos_token_id in {GENERATION}")
    chat = _open_chat(folder, config, problems) if stops else None
    ends = chat is not None and _ends_its_turns(chat, problems)
    if not (folder / GENERATION).exists() and stops:
        text = f"no {GENERATION}: only the tokenizer's own token ends an answer"
        if ends:
            notes.append(f"{text}, as it does in the chat template")
        else:
            problems.append(f"{text}; copy the file from the original model")
    template = chat.tokenizer.chat_template if chat is not None else tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if template and reads_the_clock(template):
        notes.append(
            "the chat template writes the date: a run keeps that of its first start, other tools write today's"
        )
    if chat is not None and _lacks_bos(chat):
        notes.append(
            f"the chat template does not write {tokenizer.bos_token}, which the tokenizer puts before a text by itself; other "
            "tools may train with it, here a conversation is what the template writes"
        )
    return Text(
        tokens=len(tokenizer),
        stops=tuple((id, tokenizer.convert_ids_to_tokens(id) or "(no such token)") for id in stops),
        template=template,
        marked=bool(template and MARKER.search(template)),
    )


def _lacks_bos(chat: Chat) -> bool:
    """Whether the tokenizer begins texts by a token that the template does not write."""
    bos = chat.tokenizer.bos_token_id
    if bos is None or chat.tokenizer("a")["input_ids"][:1] != [bos]:
        return False
    try:
        return bool(chat.prompt(CONVERSATION[:1]).prompt.tokens[0] != bos)
    except ValueError:  # said by others of these checks
        return False


def read_images(folder: Path, config: ModelConfig | None, problems: list[str]) -> str | None:
    """How many soft tokens an image has, in words; None for text models and where the settings do not say."""
    if config is None or config.vision is None:
        return None
    vision = config.vision
    size = _image_size(folder, config, problems)
    if isinstance(vision, SiglipConfig):
        square = (vision.image_size, vision.image_size)
        if size is not None and (size["height"], size["width"]) != square:
            problems.append(
                f"images: the processor makes {size['height']} x {size['width']} px, the tower takes "
                f"{square[0]} x {square[1]}: copy the image settings from the original model"
            )
        return f"{vision.tokens} soft tokens each, from {square[0]} x {square[1]} px"
    if size is None:
        return None
    side, low, high = vision.patch * vision.merge, size["shortest_edge"], size["longest_edge"]
    return (
        f"{low // side**2} to {high // side**2} soft tokens by size, one for {side} x {side} px "
        f"(min_pixels {low:,}, max_pixels {high:,})"
    )


def _image_size(folder: Path, config: ModelConfig, problems: list[str]) -> dict[str, int] | None:
    """The `size` of the image processor's settings, when the settings can be used."""
    assert config.vision is not None
    if _asks_for_code(folder, IMAGE_SETTINGS, problems):
        return None
    if not any((folder / name).exists() for name in IMAGE_SETTINGS):
        problems.append(f"no image settings ({' or '.join(IMAGE_SETTINGS)}): copy them from the original model")
        return None
    try:
        open_pixels(folder, family=config.family, image_tokens=config.vision.tokens)
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        if isinstance(config.vision, QwenVisionConfig):
            cuts = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
            takes = (config.vision.patch, config.vision.merge, config.vision.frames)
            if cuts != takes:
                problems.append(
                    f"images: the processor cuts by (patch_size, merge_size, temporal_patch_size) = {cuts}, the tower takes "
                    f"{takes}: copy the image settings from the original model"
                )
        return dict(processor.size)
    except (ValueError, OSError) as error:
        problems.append(f"images: {one_line(error, folder)}")
        return None


def _asks_for_code(folder: Path, names: tuple[str, ...], problems: list[str]) -> bool:
    """Also true of settings that cannot be read; the reason is among `problems` then."""
    before = len(problems)
    for name in names:
        try:
            asks = (folder / name).exists() and "auto_map" in read_json(folder / name)
        except ValueError as error:
            problems.append(one_line(error, folder))
            continue
        if asks:
            problems.append(
                f"{name} asks for code of its own (auto_map), which is never run: use the files of a model that "
                "transformers knows"
            )
    return len(problems) > before


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, problems: list[str]) -> None:
    """Only soft tokens of images need no row of their own: what stands there is never looked up."""
    soft = tokenizer.special_tokens_map.get("image_token")
    beyond = [id for token, id in tokenizer.get_vocab().items() if id >= rows and token != soft]
    if beyond:
        problems.append(
            f"the tokenizer has {len(beyond)} tokens (ids up to {max(beyond)}) that the embedding of {rows} rows has "
            "not: use the tokenizer that the checkpoint came with, or resize the embedding before training"
        )


def _open_chat(folder: Path, config: ModelConfig | None, problems: list[str]) -> Chat | None:
    vision = config is not None and config.vision is not None
    try:
        # No image is counted here: the function only says that there may be some.
        return open_chat(folder, family=config.family if vision else "", image_tokens=len if vision else None)
    except ValueError as error:
        problems.append(one_line(error, folder))
        return None


def _ends_its_turns(chat: Chat, problems: list[str]) -> bool:
    """Whether a training example can be made: the template ends the model's turns by a stop token."""
    try:
        chat.example(CONVERSATION)
    except ValueError as error:
        problems.append(f"the chat template makes no training example: {error}")
        return False
    return True
