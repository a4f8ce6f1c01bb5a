"""Measures of texts against references, in the scale of arXiv 2503.09443: hundredths.

Each takes answers of one language. What cannot be measured here raises Missing with the reason; a
number is never made up.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fastvlm.florenz.data.annotations import CAPTION, TRANSLATION
from fastvlm.florenz.evaluation.records import Answer
from fastvlm.florenz.evaluation.tokens import Missing, need_java, tokenized

_NEEDED = "is not installed (pip install 'fastvlm[evaluate]')"
_METEOR_JAR = "meteor-1.5.jar"
# it normalizes words of these languages itself
_METEOR_NORMALIZES = ("en", "de", "fr", "es")


@dataclass(frozen=True)
class Means:
    """What measures may need: words of CIDEr (one of `tokens.TOKENIZERS`), folder of METEOR 1.5 or
    None for pycocoevalcap's, id or folder of CLIP and of COMET's checkpoint, device."""

    words: str = "ptb"
    meteor: str | None = None
    clip: str = "openai/clip-vit-base-patch32"
    comet: str = "Unbabel/wmt22-comet-da"
    device: str = "cpu"


def bleu(found: Sequence[Answer], language: str, means: Means) -> float:
    """Of the corpus, by sacrebleu: 13a's words, Chinese by its own tokenizer."""
    sacrebleu = _sacrebleu(means)
    texts, references = _aligned(found)
    tokenize = "zh" if language == "zh" else "13a"
    return float(sacrebleu.corpus_bleu(texts, references, tokenize=tokenize).score)


def chrf(found: Sequence[Answer], language: str, means: Means) -> float:
    """chrF2 of the corpus, by sacrebleu."""
    texts, references = _aligned(found)
    return float(_sacrebleu(means).corpus_chrf(texts, references).score)


def cider(found: Sequence[Answer], language: str, means: Means) -> float:
    """CIDEr-D by pycocoevalcap, words weighted by how few of the pictures' references have them."""
    scorer = _cider(means)
    wanted, written = _in_words(found, language, means)
    return 100 * float(scorer.compute_score(wanted, written)[0])


def bleu4(found: Sequence[Answer], language: str, means: Means) -> float:
    """BLEU of one to four words by pycocoevalcap, as captions are measured: words as for CIDEr."""
    scorer = _bleu4(means)
    wanted, written = _in_words(found, language, means)
    scores, _ = scorer.compute_score(wanted, written, verbose=0)
    return 100 * float(scores[-1])


def _in_words(
    found: Sequence[Answer], language: str, means: Means
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and texts by number, as words; all at once, for a tokenizer may be a process."""
    texts = [text for one in found for text in (one.text, *one.references)]
    parts = iter(tokenized(texts, means.words, language))
    wanted, written = {}, {}
    for number, one in enumerate(found):
        written[number] = [next(parts)]
        wanted[number] = [next(parts) for _ in one.references]
    return wanted, written


def meteor(found: Sequence[Answer], language: str, means: Means) -> float:
    """METEOR 1.5, in the languages that its folder has paraphrases of."""
    folder = _meteor_folder(means)
    if not (folder / "data" / f"paraphrase-{language}.gz").is_file():
        raise Missing(f"METEOR in {folder} has no data/paraphrase-{language}.gz")
    most = max(len(one.references) for one in found)
    # equally many for each: one that stands twice changes no best match
    rows = [(*one.references, *one.references[:1] * (most - len(one.references))) for one in found]
    with tempfile.TemporaryDirectory() as place:
        for name, lines in (
            ("texts", [one.text for one in found]),
            ("references", [text for row in rows for text in row]),
        ):
            content = "".join(" ".join(line.split()) + "\n" for line in lines)
            (Path(place) / name).write_text(content, encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(folder / _METEOR_JAR)]
        command += [f"{place}/texts", f"{place}/references", "-r", str(most), "-l", language]
        command += ["-norm"] if language in _METEOR_NORMALIZES else []
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", check=False
        )
    score = re.search(r"Final score:\s+([\d.]+)", done.stdout)
    if done.returncode or score is None:
        why = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise Missing(f"METEOR ended without a score ({why})")
    return 100 * float(score[1])


def comet(found: Sequence[Answer], language: str, means: Means) -> float:
    """COMET of source, text and the first reference, the mean of the sentences."""
    download_model, load_from_checkpoint = _comet(means)
    if any(one.source is None for one in found):
        raise Missing("COMET is of translations")
    folder = Path(means.comet)
    model = load_from_checkpoint(means.comet if folder.is_file() else download_model(means.comet))
    rows = [{"src": one.source, "mt": one.text, "ref": one.references[0]} for one in found]
    scores = model.predict(rows, batch_size=8, gpus=int(means.device == "cuda"))
    return 100 * float(scores.system_score)


def clipscore(found: Sequence[Answer], language: str, means: Means) -> float:
    """2.5 max(cos, 0) of CLIP's features of picture and text, the mean."""
    if language != "en":
        raise Missing("CLIP reads English; the paper's multilingual CLIP is not here")
    from fastvlm.florenz.evaluation.clip import mean_clipscore

    return 100 * mean_clipscore(found, means.clip, means.device)


def accuracy(found: Sequence[Answer], language: str, means: Means) -> float:
    """Of CoMMuTE: how often the right translation is likelier than the wrong one."""
    if any(one.right is None for one in found):
        raise Missing("the answers are of no set with wrong translations")
    return 100 * sum(bool(one.right) for one in found) / len(found)


def _sacrebleu(means: Means) -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise Missing(f"sacrebleu {_NEEDED}") from None
    return sacrebleu


def _cider(means: Means) -> Any:
    return _pycocoevalcap("cider.cider", means).Cider()


def _bleu4(means: Means) -> Any:
    return _pycocoevalcap("bleu.bleu", means).Bleu(4)


def _pycocoevalcap(module: str, means: Means) -> Any:
    try:
        found = import_module(f"pycocoevalcap.{module}")
    except ImportError:
        raise Missing(f"pycocoevalcap {_NEEDED}") from None
    if means.words == "ptb":
        need_java()
    return found


def _comet(means: Means) -> Any:
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError:
        raise Missing(
            "unbabel-comet is not installed; it wants an older transformers, so install it beside "
            "fastvlm in another environment, and score there with --answers"
        ) from None
    return download_model, load_from_checkpoint


def _aligned(found: Sequence[Answer]) -> tuple[list[str], list[list[str | None]]]:
    """Texts, and the first references of all, the second ones, and so on; None where there is no
    more of them."""
    most = max(len(one.references) for one in found)
    rows = [[*one.references, *[None] * (most - len(one.references))] for one in found]
    return [one.text for one in found], [list(column) for column in zip(*rows)]


def _meteor_folder(means: Means) -> Path:
    need_java()
    if means.meteor is not None:
        folder = Path(means.meteor)
        if not (folder / _METEOR_JAR).is_file():
            raise Missing(f"no {_METEOR_JAR} in {folder}")
        return folder
    try:
        import pycocoevalcap.meteor as package
    except ImportError:
        raise Missing(f"pycocoevalcap {_NEEDED}") from None
    return Path(package.__path__[0])


@dataclass(frozen=True)
class Metric:
    """name: in results. tasks: that it is of. needs: raises Missing where a package is not here.
    usual: without being asked for."""

    name: str
    measure: Callable[[Sequence[Answer], str, Means], float]
    tasks: tuple[str, ...]
    needs: Callable[[Means], Any]
    usual: bool = True


METRICS = {
    "cider": Metric("CIDEr", cider, (CAPTION,), _cider),
    "b@4": Metric("B@4", bleu4, (CAPTION,), _bleu4),
    "bleu": Metric("BLEU", bleu, (TRANSLATION,), _sacrebleu),
    "chrf": Metric("chrF", chrf, (TRANSLATION,), _sacrebleu),
    "meteor": Metric("METEOR", meteor, (CAPTION, TRANSLATION), _meteor_folder),
    "accuracy": Metric("accuracy", accuracy, (TRANSLATION,), lambda means: None),
    "comet": Metric("COMET", comet, (TRANSLATION,), _comet, usual=False),
    "clipscore": Metric("CLIPScore", clipscore, (CAPTION,), lambda means: None, usual=False),
}


def metrics_of(task: str, set_name: str) -> list[str]:
    """Those that a set is measured by without being asked."""
    return [
        name
        for name, metric in METRICS.items()
        if metric.usual and task in metric.tasks and (name != "accuracy" or set_name == "commute")
    ]
