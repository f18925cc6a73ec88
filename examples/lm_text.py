"""The text that ``compare_lm.py`` learns: Python sources found on this machine, as tokens."""

from __future__ import annotations

import os
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # a vocabulary of this size needs no tokenizer
TOKENIZER_SAMPLE = 32_000_000  # bytes of training text that pieces are learnt from


def find_sources(kind: str) -> tuple[list[bytes], list[bytes]]:
    """The files to train on, and the held-out ones, in the order of their folders: put end to end, what a file defines
    or imports recurs later in the same context."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    # Installed packages are not the standard library; tests and tables would outweigh everything else.
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
    if kind == "site":
        roots += sorted({Path(sysconfig.get_path("purelib")), Path(torch.__file__).parent.parent})
    training, held_out, known = [], [], set()
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - skipped)
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix != ".py" or not path.is_file():
                    continue
                content = path.read_bytes()
                checksum = zlib.crc32(content)
                # Copies of one file, such as vendored packages, must not be on both sides.
                if checksum not in known:
                    known.add(checksum)
                    (held_out if zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0 else training).append(
                        content
                    )
    sizes = [sum(map(len, files)) for files in (training, held_out)]
    if min(sizes) < 100_000:
        raise SystemExit(f"{roots} hold too few Python sources: {sizes[0]} + {sizes[1]} bytes")
    return training, held_out


def learn_pieces(training: list[bytes], vocabulary: int):
    """A byte-pair tokenizer of so many pieces, as GPT-2 has one; learnt from a sample of the training files."""
    try:
        import tokenizers
    except ImportError as error:
        raise SystemExit(f"--vocabulary other than {BYTES} needs the package tokenizers: {error}") from error
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    stride = max(1, sum(map(len, training)) // TOKENIZER_SAMPLE)
    sample = (content.decode(errors="replace") for content in training[::stride])
    tokenizer.train_from_iterator(sample, vocab_size=vocabulary, show_progress=False)
    return tokenizer


def encode(tokenizer, files: list[bytes]) -> Tensor:
    """The files end to end as ``[tokens]`` indices of pieces."""
    parts = []
    for begin in range(0, len(files), 1000):  # what the tokenizer returns takes many times the room of its indices
        batch = [content.decode(errors="replace") for content in files[begin : begin + 1000]]
        parts += [torch.tensor(found.ids, dtype=torch.int32) for found in tokenizer.encode_batch(batch)]
    return torch.cat(parts)


def read_text(kind: str, vocabulary: int, kept: Path) -> tuple[Tensor, Tensor, dict]:
    """Tokens to train on, held-out tokens, and facts about them; tokens other than bytes are kept in a folder."""
    sources = find_sources(kind)
    raw = [b"".join(files) for files in sources]
    checksum = zlib.crc32(raw[1], zlib.crc32(raw[0]))
    facts = {"training_bytes": len(raw[0]), "held_out_bytes": len(raw[1]), "checksum": checksum}
    if vocabulary == BYTES:
        texts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in raw]
    else:
        path = kept / f"text_{checksum:08x}_{vocabulary}.pt"
        if not path.exists():
            tokenizer = learn_pieces(sources[0], vocabulary)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save([encode(tokenizer, files) for files in sources], partial)
            os.replace(partial, path)
        texts = torch.load(path, weights_only=True)
    return *texts, facts | {"bytes_per_token": round(len(raw[1]) / texts[1].numel(), 3)}


def excerpts(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """``[len(starts), length]`` tokens of the text as indices."""
    return text[starts.to(text.device).unsqueeze(-1) + torch.arange(length, device=text.device)].long()
