"""The processor and the tokenizer of a checkpoint, without any of its code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastvlm.compat import hf
from fastvlm.loading.errors import LoadError, first_line
from fastvlm.loading.source import Source

# what Microsoft's processor adds to BART's words, in this order: 50265 to 51288
_WORDS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{place}>" for place in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>"),
    *("<seg>", "</seg>", "<sep>", "<region_cap>", "</region_cap>"),
    *("<region_to_desciption>", "</region_to_desciption>", "<proposal>", "</proposal>"),
    *("<poly>", "</poly>", "<and>"),
)
# phrases that a grounding does not count as objects
_NO_OBJECTS = """
it, I, me, mine, you, your, yours, he, him, his, she, her, hers, they, them, their, theirs, one,
oneself, we, us, our, ours, its, myself, yourself, himself, herself, itself, ourselves, yourselves,
themselves, this, that, these, those, who, whom, whose, which, what, all, another, any, anybody,
anyone, anything, each, everybody, everyone, everything, few, many, nobody, none, several, some,
somebody, someone, something, image, images, the, a, an, each other, one another, the image,
a group, other objects, lots, a set
"""
# rules by which transformers' processor reads answers, as Microsoft's has them
_ANSWERS: dict[str, dict[str, Any]] = {
    "pure_text": {},
    "ocr": {"AREA_THRESHOLD": 0.01},
    "phrase_grounding": {"banned_grounding_tokens": re.split(r",\s", _NO_OBJECTS.strip())},
    "description_with_bboxes": {},
    "description_with_polygons": {},
    "polygons": {},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}
_PICTURES = ("preprocessor_config", "processor_config")
_WORD_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")
_THEIR_PROCESSOR = "processing_florence2.Florence2Processor"
# of the pictures that the towers were trained on
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDE = 32  # pixels of a picture to one position of the tower
DECODER_FOLDER = "decoder_tokenizer"


def of_images(
    source: Source, layout: str, config: Any, image_size: int | None, trusted: bool
) -> Any:
    """The processor of images and prompts, or a tokenizer where the model sees none; None: it has
    neither. image_size: the side that pictures are scaled to; None: as its files say.

    LoadError: files that do not load, or whose words do not fit the model.
    """
    try:
        if layout == "microsoft":
            found = _florence2(source, config.text_config.vocab_size, config.image_token_id)
        elif layout == "paper":
            found = _florence2(source, config.encoder.vocab_size, config.image_token_id)
        else:
            found = _own(source, layout == "florenz" or config.model_type == "florence2", trusted)
    except LoadError:
        raise
    except Exception as error:  # each kind of file has errors of its own
        raise LoadError(source.id, f"its processor does not load ({first_line(error)})") from error
    if image_size is not None:
        _scale(source, found, image_size)
    return found


def of_captions(source: Source, *, beside: bool) -> Any:
    """The tokenizer of a Florenz model's captions; None where there is none.

    beside: source is the model's own: it lies in decoder_tokenizer there, or is Gemma's, which the
    paper's code stores in front.
    """
    from transformers import AutoTokenizer

    folder = source.folder
    if beside and (folder / DECODER_FOLDER).is_dir():
        folder = folder / DECODER_FOLDER
    elif beside and not _is_gemmas(source):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise LoadError(folder, f"must be a tokenizer ({first_line(error)})") from error


def _florence2(source: Source, rows: int, image_token_id: int) -> Any:
    """transformers' Florence2Processor from the files that Microsoft's reads; None without them.

    rows: of the table that its words are looked up in. image_token_id: the placeholder of an image.
    """
    if not source.has(*_PICTURES) or not source.has(*_WORD_FILES) or _is_gemmas(source):
        return None
    from transformers import BartTokenizerFast, Florence2Processor

    # the images as they were in training: scaled by PIL, where there is a choice
    pictures = hf.clip_image_processor().from_pretrained(source.folder)
    words = with_image_token(BartTokenizerFast.from_pretrained(source.folder), image_token_id)
    # behind the table only the placeholder may stand
    if len(words) > max(rows, image_token_id + 1) or words.image_token_id != image_token_id:
        problem = f"its tokenizer has {len(words)} words, its table {rows} rows"
        raise LoadError(source.id, problem)
    if hasattr(pictures, "auto_map"):
        del pictures.auto_map  # no code of the checkpoint goes along when this one is saved
    made = Florence2Processor(pictures, words, post_processor_config=_ANSWERS)
    # their processor counts no placeholders, so its files need not know their number
    _count(made)
    return made


def _own(source: Source, sees: bool, trusted: bool) -> Any:
    """transformers' own. sees: it must have images, and a folder may lack it."""
    from transformers import AutoProcessor, AutoTokenizer, Florence2Processor

    # transformers makes an empty tokenizer for a folder without one
    if not source.has(*_PICTURES, *_WORD_FILES):
        return None
    if sees:
        return Florence2Processor.from_pretrained(source.folder) if source.has(*_PICTURES) else None
    again = {**source.again(), **({"trust_remote_code": True} if trusted else {})}
    try:
        return AutoProcessor.from_pretrained(source.id, **again)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return AutoTokenizer.from_pretrained(source.id, **again)


def _is_gemmas(source: Source) -> bool:
    told = source.json("tokenizer_config.json") or {}
    return str(told.get("tokenizer_class", "")).startswith("Gemma")


def _scale(source: Source, processor: Any, side: int) -> None:
    if not hasattr(processor, "num_image_tokens"):
        raise LoadError(source.id, f"must have a Florence-2 processor for image_size; got {side}")
    if not isinstance(side, int) or side < STRIDE:
        wanted = f"image_size must be a whole number of at least {STRIDE}"
        raise LoadError(source.id, f"{wanted}; got {side!r}")
    pictures = processor.image_processor
    pictures.size = {"height": side, "width": side}
    _count(processor)


def square(words: Any, side: int) -> Any:
    """A Florence2Processor of prompts in the words of a tokenizer, and of pictures that are scaled
    to a square of so many pixels a side. Nothing of an answer is left out when it is read."""
    from PIL import Image
    from transformers import CLIPImageProcessor, Florence2Processor

    pictures = CLIPImageProcessor(
        size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        image_seq_length=1 + (side // STRIDE) ** 2,
    )
    rules: dict[str, dict[str, Any]] = {kind: {} for kind in _ANSWERS}
    return Florence2Processor(pictures, words, post_processor_config=rules)


def _count(processor: Any) -> None:
    """Placeholders as many as the tower makes features: one for each position, and their mean."""
    pictures = processor.image_processor
    height, width = pictures.size["height"], pictures.size["width"]
    pictures.image_seq_length = 1 + -(-height // STRIDE) * -(-width // STRIDE)
    processor.num_image_tokens = pictures.image_seq_length


def with_image_token(words: Any, image_token_id: int) -> Any:
    """A BART tokenizer with Florence-2's words behind its own, and the token of that id as
    placeholder: <image>, added behind them all, where it has none of that id."""
    from transformers import PreTrainedTokenizerFast

    words.add_special_tokens({"additional_special_tokens": list(_WORDS)})
    place = words.convert_ids_to_tokens(image_token_id) if image_token_id < len(words) else None
    special = {name: value for name, value in words.special_tokens_map.items() if "token" in name}
    special = {name: value for name, value in special.items() if isinstance(value, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        model_max_length=words.model_max_length,
        **special,
        extra_special_tokens={"image_token": place or "<image>"},
    )
    made.add_special_tokens({"additional_special_tokens": list(_WORDS)})
    return made


def save_for_theirs(processor: Any, folder: Path) -> None:
    """The files that Microsoft's processor reads, for a Florence2Processor.

    Words that it adds by itself, and the placeholder that it does not know, change no id of others.
    """
    words, pictures = processor.tokenizer, processor.image_processor
    words.backend_tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "BartTokenizer", "model_max_length": words.model_max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    fields = {k: v for k, v in pictures.to_dict().items() if not k.startswith("_")}
    fields |= {
        "auto_map": {"AutoProcessor": "microsoft/Florence-2-large--" + _THEIR_PROCESSOR},
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "Florence2Processor",
        "image_seq_length": processor.num_image_tokens,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
