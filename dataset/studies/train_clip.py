"""Train the tiny CLIP from scratch on drawings with known labels; nano's encoder is its image tower.

In:  the world's *train* split (all 1,900 names, English and Chinese), the drawings (digits, dice, cards, shapes, Sokoban) and
     easy-VQA's *train* images.  Out: `out/clip`: clip.safetensors (both towers), tiny_clip.safetensors (the image tower, fp16)
     and tiny_clip.json. The encoder that `nano` and its checkpoints use stays as it is, unless --ship names its file.

The loss is a sum of three:
- image-text: CLIP's contrastive loss between pictures and captions (Radford et al. 2021, arXiv 2103.00020; open_clip's code);
- region-text: each patch token is matched with the name of the object it lies on, among all names in the batch (RegionCLIP,
  arXiv 2112.09106; GLIP, arXiv 2112.03857). Without it patch tokens learn much more slowly where objects are;
- place: each patch token shows by its direction in which ninth of the picture the centre of its object lies; each ninth has a
  fixed direction. A language model behind a frozen encoder and one linear layer cannot tell two equal objects apart otherwise,
  because RoPE gives it distances only.

    python -m dataset.studies.train_clip                     an hour on two CPU cores
    python -m dataset.studies.train_clip --ship model/encoder/tiny_clip.safetensors      replaces the encoder of `nano`
    python -m dataset.studies.train_clip --minutes 600 --init out/clip/clip.safetensors        continue for longer
    python -m dataset.studies.train_clip --minutes 25 --init model/encoder/tiny_clip.safetensors      from the shipped image tower

No module imports this program. The model is open_clip's, so its weights load like those of any CLIP.
"""
from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dataset.tasks.easy_vqa import known_shapes, shape_drawing
from dataset.tokenizer import SentencePieceTokenizer
from dataset.world import drawings
from dataset.world.drawings import Drawing, Region
from dataset.world.openmoji import LANGUAGES, Category, categories
from dataset.world.scenes import CANVAS, Object, Scene, draw_scene, is_new, light, sample_scene
from dataset.world.words import caption

MEAN, STD = (0.85, 0.84, 0.83), (0.25, 0.26, 0.27)  # roughly those of the drawings, RGB
CONTEXT = 40  # maximum tokens of a caption


@dataclass
class Config:
    minutes: float = 60.0  # training time; the learning rate decays during the last quarter
    batch_size: int = 128  # pictures a step
    lr: float = 1e-3  # peak learning rate of Muon (matrices of the blocks) and AdamW (the rest)
    weight_decay: float = 0.05  # of Muon alone
    warmup: int = 300  # warm-up steps
    region_weight: float = 2.0  # weight of the region-text loss; that of the image-text loss is 1
    place_weight: float = 1.0  # weight of the place loss
    width: int = 192  # channels of the image tower
    layers: int = 5  # blocks of the image tower
    init: Path | None = None  # weights to start from: a clip.safetensors, or an image tower alone; default: random
    out: Path = Path("out/clip")  # folder of the full model (both towers)
    ship: Path | None = None  # file of the image tower; default: tiny_clip.safetensors in --out
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # device to train on
    seed: int = 0  # seed of the weights and drawings


# ---------------------------------------------------------------- pictures with their truth

def emoji_drawing(rng: random.Random, pool: list[Category]) -> Drawing:
    """A nearly full scene in cells of 32, 48 or 96 pixels, without held-out combinations.

    It is nearly full because a picture costs the same with more objects, and each object is a training example.
    """
    across = rng.choices((3, 2, 1), (16, 3, 1))[0]
    cell = CANVAS // across
    count = rng.randint(max(1, across * across - 3), across * across)
    members: list[Category] = []
    for _ in range(4 * count):
        if len(members) < count:
            category = rng.choice(members) if members and rng.random() < 0.1 else rng.choice(pool)
            trial = Scene("", tuple(Object(c, 0, 0, 0, 0) for c in [*members, category]), (0, 0, 0))
            if not is_new(trial):
                members.append(category)
    objects = []
    for place, category in zip(sorted(rng.sample(range(across * across), len(members))), members):
        size = rng.randrange(cell * 2 // 3, cell + 1, 2)
        row, column = divmod(place, across)
        objects.append(Object(category, place, column * cell + rng.randint(0, cell - size),
                              row * cell + rng.randint(0, cell - size), size))
    scene = Scene("", tuple(objects), light(rng))
    regions = tuple(Region((obj.x, obj.y, obj.x + obj.size, obj.y + obj.size), obj.category.en, obj.category.zh)
                    for obj in objects)
    return Drawing(draw_scene(scene), caption(scene, "en"), caption(scene, "zh"), regions)


def any_drawing(rng: random.Random, pool: list[Category], shapes: list) -> Drawing:
    """A random training picture: emoji, an easy-VQA picture, or another drawing."""
    source = rng.random()
    if source < 0.72:
        return emoji_drawing(rng, pool)
    return shape_drawing(rng.choice(shapes), rng) if source < 0.77 else drawings.random_drawing(rng)


def to_pixels(images: list) -> torch.Tensor:
    """PIL pictures of 96 x 96 -> (N, 3, 96, 96), normalised."""
    array = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    return (array - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def region_targets(batch: list[Drawing], language: str, patch: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """((N, 36) the index of each patch's name, -1 for patches without a target; the names).

    Of the empty patches only one in eight gets a target ('nothing'), because they would be most of the batch.
    """
    names: dict[str, int] = {}
    targets = np.full((len(batch), (CANVAS // patch) ** 2), -1)
    for row, picture in zip(targets, batch):
        for place, owner in enumerate(drawings.region_of_patches(picture.regions, patch)):
            if owner >= 0:
                name = getattr(picture.regions[owner], language)
            elif rng.random() < 0.125:
                name = {"en": "nothing", "zh": "没有东西"}[language]
            else:
                continue
            row[place] = names.setdefault(name, len(names))
    return torch.from_numpy(targets), list(names)


def place_targets(batch: list[Drawing], patch: int) -> torch.Tensor:
    """(N, 36): the place (0 to 8, in reading order) of the centre of each patch's object; for empty patches their own place."""
    across = CANVAS // patch
    own = [(row * 3 // across) * 3 + column * 3 // across for row in range(across) for column in range(across)]
    targets = np.tile(own, (len(batch), 1))
    for row, picture in zip(targets, batch):
        middles = [((box[0] + box[2]) // 2, (box[1] + box[3]) // 2) for box in (region.box for region in picture.regions)]
        for place, owner in enumerate(drawings.region_of_patches(picture.regions, patch)):
            if owner >= 0:
                x, y = middles[owner]
                row[place] = min(int(y) * 3 // CANVAS, 2) * 3 + min(int(x) * 3 // CANVAS, 2)
    return torch.from_numpy(targets)


# ---------------------------------------------------------------- the model: open_clip's, small

def build(config: Config, tokenizer: SentencePieceTokenizer) -> open_clip.CLIP:
    vision = dict(image_size=CANVAS, patch_size=drawings.TILE, width=config.width, layers=config.layers, head_width=32)
    text = dict(context_length=CONTEXT, vocab_size=tokenizer.vocab_size, width=128, heads=4, layers=2,
                pool_type="eos", eos_id=tokenizer.end, pad_id=tokenizer.pad)
    return open_clip.CLIP(embed_dim=config.width, vision_cfg=vision, text_cfg=text)


def encode_images(clip: open_clip.CLIP, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 3, S, S) -> embeddings of pictures (N, E) and patches (N, P, E), and the tokens (N, 1 + P, D).

    The embeddings, of unit length, are projections of the tokens. A language model gets the tokens.
    """
    out = clip.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC", output_extra_tokens=True,
                                            intermediates_only=True, normalize_intermediates=False)
    tokens = torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], dim=1)  # (N, 1 + P, D)
    embedded = F.normalize(clip.visual.ln_post(tokens) @ clip.visual.proj, dim=-1)
    return embedded[:, 0], embedded[:, 1:], tokens


def encode_texts(clip: open_clip.CLIP, tokenizer: SentencePieceTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> (len(texts), E), of unit length. As `clip.encode_text`, but padded only to the longest text: names are short."""
    device = clip.text_projection.device
    rows = [tokenizer.encode(text)[:CONTEXT - 1] + [tokenizer.end] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad] * (longest - len(row)) for row in rows], device=device)
    x = clip.token_embedding(ids) + clip.positional_embedding[:longest]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:longest, :longest]))
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    return F.normalize(x[torch.arange(len(rows), device=device), ends] @ clip.text_projection, dim=-1)


def place_loss(patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, P, D), (N, P) -> scalar: cross-entropy of 10 times the cosines with nine fixed directions.

    A token that is 99 % sure of its place has a cosine of 0.7 with it: half of its squared length. A learned head or a larger
    factor would need only a faint trace, which the language model could hardly read.
    """
    directions = torch.linalg.qr(torch.randn(patches.shape[-1], 9, generator=torch.Generator().manual_seed(0)))[0]
    logits = 10 * F.normalize(patches, dim=-1) @ directions.to(patches.device)  # (N, P, 9)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(clip, tokenizer, contrastive, batch: list[Drawing], rng: random.Random):
    """(image-text, region-text, place): the three losses of a batch of drawings."""
    device = clip.text_projection.device
    pixels = to_pixels([picture.image for picture in batch]).to(device)
    image, patches, tokens = encode_images(clip, pixels)
    captions = [getattr(picture, rng.choice(LANGUAGES)) for picture in batch]
    scale = clip.logit_scale.exp()
    image_text = contrastive(image, encode_texts(clip, tokenizer, captions), scale)
    targets, names = region_targets(batch, rng.choice(LANGUAGES), drawings.TILE, rng)
    has_target = (targets >= 0).to(device)
    logits = scale * patches[has_target] @ encode_texts(clip, tokenizer, names).T  # (patches with a target, names)
    region_text = F.cross_entropy(logits, targets.to(device)[has_target])
    return image_text, region_text, place_loss(tokens[:, 1:], place_targets(batch, drawings.TILE).to(device))


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def patch_accuracy(clip, tokenizer, pictures: list[Drawing], language: str, names: list[str]) -> float:
    """The share of patch tokens on objects whose nearest name among `names` is that of the object."""
    correct, total, device = 0, 0, clip.text_projection.device
    table = torch.cat([encode_texts(clip, tokenizer, names[i:i + 512]) for i in range(0, len(names), 512)])
    index = {name: i for i, name in enumerate(names)}
    for start in range(0, len(pictures), 128):
        batch = pictures[start:start + 128]
        patches = encode_images(clip, to_pixels([picture.image for picture in batch]).to(device))[1]
        owners = np.stack([drawings.region_of_patches(picture.regions, drawings.TILE) for picture in batch])
        truth = [index[getattr(batch[n].regions[owners[n, p]], language)] for n, p in np.argwhere(owners >= 0)]
        guess = (patches[torch.from_numpy(owners >= 0).to(device)] @ table.T).argmax(-1).cpu()
        correct += int((guess == torch.tensor(truth)).sum())
        total += len(truth)
    return correct / total


def scene_drawing(scene: Scene) -> Drawing:
    """A scene as a `Drawing` without captions."""
    regions = tuple(Region((obj.x, obj.y, obj.x + obj.size, obj.y + obj.size), obj.category.en, obj.category.zh)
                    for obj in scene.objects)
    return Drawing(draw_scene(scene), "", "", regions)


def scores(clip, tokenizer) -> dict[str, float]:
    """Patch accuracies on held-out pictures: `val` scenes with nano or all names, and each kind of drawing with its own names."""
    result = {}
    for which, n in (("nano", 300), ("all", 800)):
        pictures = [scene_drawing(sample_scene("val", i, which)) for i in range(n)]
        for language in LANGUAGES:
            names = sorted({category.name(language) for category in categories(which)})
            result[f"{which}/{language}"] = patch_accuracy(clip, tokenizer, pictures, language, names)
    rng = random.Random("held-out drawings")
    groups: dict[str, list[Drawing]] = {}
    for _ in range(1500):
        picture = drawings.random_drawing(rng)
        groups.setdefault(picture.en.split(":")[0].split(" with ")[0].rstrip("0123456789, ."), []).append(picture)
    for kind, pictures in sorted(groups.items()):
        if len(pictures) > 20:
            names = sorted({region.en for picture in pictures for region in picture.regions})
            result[kind] = patch_accuracy(clip, tokenizer, pictures, "en", names)
    return result


def shipped(config: Config) -> Path:
    """The file of the image tower. Only --ship writes outside --out: checkpoints need the encoder that they were trained with."""
    return config.ship or config.out / "tiny_clip.safetensors"


def save(clip, config: Config, measured: dict[str, float]) -> None:
    """Write the full model, the image tower with its facts, and the scores."""
    config.out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, config.out / "clip.safetensors")
    tower = {name: tensor.half().contiguous() for name, tensor in clip.visual.state_dict().items()}
    ship = shipped(config)
    save_file(tower, ship)
    facts = dict(size=CANVAS, patch=drawings.TILE, width=config.width, layers=config.layers, heads=config.width // 32,
                 mlp=4 * config.width, output=config.width, activation="gelu", mean=MEAN, std=STD)
    ship.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    (config.out / "scores.json").write_text(json.dumps(measured, indent=1) + "\n")


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = SentencePieceTokenizer()
    clip = build(config, tokenizer).to(config.device)
    if config.init:
        weights = load_file(config.init)
        part = clip if "logit_scale" in weights else clip.visual
        part.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    hidden = [p for name, p in clip.named_parameters() if p.ndim == 2 and "resblocks" in name]
    others = [p for p in clip.parameters() if all(p is not matrix for matrix in hidden)]
    optimizers = [torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    pool = [*categories("all"), *categories("nano") * 8]
    shapes = list(known_shapes().items())
    contrastive = open_clip.ClipLoss()
    print(f"image tower {sum(p.numel() for p in clip.visual.parameters()):,} parameters, {len(shapes)} easy-VQA pictures")
    start, step, log = time.time(), 0, []
    bar = tqdm(total=round(config.minutes * 60), unit="s")
    while (done := (time.time() - start) / (60 * config.minutes)) < 1:
        lr = config.lr * min(1, (step + 1) / config.warmup, (1 - done) / 0.25)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        batch = [any_drawing(rng, pool, shapes) for _ in range(config.batch_size)]
        image_text, region_text, place = losses(clip, tokenizer, contrastive, batch, rng)
        clip.zero_grad()
        (image_text + config.region_weight * region_text + config.place_weight * place).backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, np.log(100))
        step += 1
        log.append((image_text.item(), region_text.item(), place.item()))
        bar.n = min(round(time.time() - start), bar.total)
        bar.set_postfix_str(f"step {step} lr {lr:.1e} " + " ".join(
            f"{name} {value:.2f}" for name, value in zip(("image-text", "region-text", "place"), log[-1])))
        if step % 500 == 0:
            measured = scores(clip, tokenizer)
            tqdm.write(f"step {step} {time.time() - start:.0f} s loss {np.mean(log[-200:], 0).round(3)} "
                       + " ".join(f"{name} {value:.3f}" for name, value in measured.items()))
            save(clip, config, measured)
    measured = scores(clip, tokenizer)
    save(clip, config, measured)
    print(json.dumps(measured, indent=1), f"\nwrote {shipped(config)} after {step} steps of {config.batch_size} pictures")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))
