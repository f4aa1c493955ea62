"""python recipes/make_glyph_vit.py --output recipes/glyph_vit

Pretrains a very small vision transformer to name printed glyphs, and keeps its encoder for the recipes.

The glyphs are letters, Greek and symbols, drawn from the DejaVu and STIX fonts that matplotlib ships. The
digits 0-9 are left out on purpose, so that fine-tuning on handwritten digits is a transfer to classes the
encoder never saw. Every training image is a fresh distortion of a glyph (affine, elastic, stroke weight),
reduced to about 8x8 pixels, white on black: the look of `sklearn.datasets.load_digits`, on which the recipe
fine-tunes.
"""

import argparse
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

IMAGE_SIZE = 32
PATCH_SIZE = 8  # two pixels of an 8x8 digit: 16 patches keep a CPU run short
CANVAS = 64  # side of the clean glyphs, twice the distorted ones
GLYPH = 48  # longest side of a glyph on its canvas: the rest is room to turn and shear it

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρςστφψω"  # without the capitals and small letters that look Latin
SYMBOLS = "&@#$%?!+<>{}[]()/\\*§¶€£¥∂∇∞∫∑√∈∉∀∃∅∧∩∪⊂⊃↑↓←→"
# Letters whose capital and small form differ in size alone are one class: every glyph is drawn at one size.
SAME_SHAPE = {upper: upper.lower() for upper in "CKOPSUVWXZ"} | {"I": "l", "∑": "Σ", "∈": "ε", "∪": "u"}
# Unicode holds more hands of the same letters (script, fraktur, double-struck...); none of these are digits.
VARIANTS = (*range(0x2100, 0x2150), *range(0x1D400, 0x1D7CC))


@dataclass
class GlyphBank:
    """Every clean glyph as a white-on-black image, and the class of each."""

    images: Tensor  # (glyphs, 1, CANVAS, CANVAS), 0 to 1
    labels: Tensor  # (glyphs,)
    classes: list[str]


def font_paths() -> list[Path]:
    """The text faces of the DejaVu and STIX families."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    patterns = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if "Display" not in path.name)


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """One character, scaled to fill the middle of a canvas; None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    if min(width, height) < 1:
        return None
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=font)
    scale = GLYPH / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = (CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2
    canvas.paste(drawn.resize(size, Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas)


def make_bank() -> GlyphBank:
    """Draws every character in every face that has it."""
    wanted = {character: character for character in LATIN + GREEK + SYMBOLS}
    for code in VARIANTS:
        plain = unicodedata.normalize("NFKC", chr(code))
        if plain in wanted:
            wanted[chr(code)] = plain
    classes = sorted({SAME_SHAPE.get(plain, plain) for plain in wanted.values()})
    index = {name: number for number, name in enumerate(classes)}

    images, labels = [], []
    for path in tqdm(font_paths(), desc="fonts"):
        available = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), GLYPH)
        for character, plain in wanted.items():
            image = draw_glyph(font, character) if ord(character) in available else None
            if image is not None:
                images.append(image)
                labels.append(index[SAME_SHAPE.get(plain, plain)])
    stacked = torch.from_numpy(np.stack(images)).float().div(255).unsqueeze(1)
    return GlyphBank(stacked, torch.tensor(labels), classes)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(low, high)


def distort(clean: Tensor) -> Tensor:
    """Fresh handwriting-like versions of `clean` glyphs, at IMAGE_SIZE and a digit's resolution."""
    count = len(clean)
    turn, shear = uniform(-0.25, 0.25, count), uniform(-0.35, 0.35, count)
    # Digits fill the height of their box but seldom its width (a factor above 1 shrinks).
    wide, tall = uniform(0.75, 1.5, count), uniform(0.75, 1.05, count)
    rows = (
        torch.stack([turn.cos() * wide, (shear - turn.sin()) * wide, uniform(-0.12, 0.12, count)], dim=1),
        torch.stack([turn.sin() * tall, turn.cos() * tall, uniform(-0.08, 0.08, count)], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    # A few random pushes, smoothly joined, bend the strokes.
    bend = F.interpolate(torch.randn(count, 2, 4, 4) * 0.07, size=grid.shape[1:3], mode="bicubic")
    image = F.grid_sample(clean, grid + bend.permute(0, 2, 3, 1), align_corners=False)

    # Thicken or thin the strokes: a blend towards the largest or smallest neighbour.
    weight = uniform(-0.4, 1.4, count, 1, 1, 1)
    thick, thin = F.max_pool2d(image, 3, 1, 1), -F.max_pool2d(-image, 3, 1, 1)
    image = image + weight.clamp(min=0) * (thick - image) + weight.clamp(max=0) * (image - thin)

    # Low resolution: most images become 8x8 as the digits are, the others a little finer.
    shares = [count - count // 2, count // 4, count // 2 - count // 4]
    for side, chosen in zip((8, 10, 12), torch.randperm(count).split(shares), strict=True):
        small = F.interpolate(image[chosen], size=(side, side), mode="area")
        small = small * uniform(1.0, 2.0, len(chosen), 1, 1, 1) + 0.03 * torch.randn_like(small)
        image[chosen] = F.interpolate(small.clamp(0, 1), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return image


def draw_batch(bank: GlyphBank, size: int) -> tuple[Tensor, Tensor]:
    """Pixel values as the image processor makes them, and labels, of `size` random glyphs."""
    chosen = torch.randint(len(bank.labels), (size,))
    pixels = (distort(bank.images[chosen]) - 0.5) / 0.5
    return pixels.expand(-1, 3, -1, -1), bank.labels[chosen]


def make_model(classes: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=classes,
    )
    return ViTForImageClassification(config)


def pretrain(model: ViTForImageClassification, bank: GlyphBank, steps: int, batch: int, peak: float) -> None:
    """AdamW with a short warm-up and a cosine decay; each batch is drawn anew."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    model.train()
    progress = tqdm(range(steps), desc="pretraining")
    for _ in progress:
        pixels, labels = draw_batch(bank, batch)
        loss = F.cross_entropy(model(pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def glyph_accuracy(model: ViTForImageClassification, bank: GlyphBank, size: int = 8192) -> float:
    """Accuracy on fresh distortions of the same glyphs."""
    model.eval()
    pixels, labels = draw_batch(bank, size)
    return (model(pixels).logits.argmax(1) == labels).float().mean().item()


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Keeps the encoder alone: whoever loads it for a new task gets a fresh head."""
    model.config.num_labels = 2  # the library's default: the names of the glyph classes go with their head
    model.vit.save_pretrained(folder)
    processor = ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the transformer that the recipes start from.")
    output = Path(__file__).parent / "glyph_vit"
    parser.add_argument("--output", type=Path, default=output, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help="glyphs per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    bank = make_bank()
    model = make_model(len(bank.classes))
    print(
        f"{len(bank.labels)} glyphs of {len(bank.classes)} classes, "
        f"{sum(weight.numel() for weight in model.vit.parameters())} encoder parameters"
    )
    pretrain(model, bank, arguments.steps, arguments.batch, arguments.lr)
    print(f"accuracy on fresh distortions: {glyph_accuracy(model, bank):.3f}")
    save(model, arguments.output)


if __name__ == "__main__":
    main()
