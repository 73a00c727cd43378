"""The model `shapes` draws what it is told: held-out prompts, 20 steps, all else by default.

    python tests/acceptance/shapes_quality.py [--preset FOLDER] [--count PROMPTS] [--gallery FILE]

Half of the prompts show what training does not, the others are of a form that training does not
have. The detector of `scenes_detector.py` judges. Each picture is also judged by another prompt,
which tells the chance level. CLIP has to find the picture of each of 256 held-out captions.
"""

import argparse
import sys
from pathlib import Path

import kdiffusion
from kdiffusion import StableDiffusion
from kdiffusion.shapes.data import SPLITS, evaluation_scenes
from kdiffusion.shapes.evaluation import evaluate, markdown
from kdiffusion.shapes.report import gallery, generate, measure_clip
from kdiffusion.training.trainers.clip import CLIPTrainer

SHAPES = Path(kdiffusion.__file__).parent / "shapes" / "model"
MAX_BYTES = 15_000_000
ONE_BAR, TWO_BAR, SHUFFLED_BAR, RETRIEVAL_BAR = 0.85, 0.60, 0.05, 0.90


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", type=Path, default=SHAPES, help="folder of the model")
    parser.add_argument("--count", type=int, default=512, help="how many held-out prompts")
    parser.add_argument("--gallery", type=Path, help="PNG file for pictures of each kind")
    arguments = parser.parse_args()
    model = StableDiffusion.from_preset(arguments.preset)
    if arguments.gallery:
        prompts = [scene.caption for split in SPLITS for scene in evaluation_scenes(split, 8)]
        gallery(generate(model, prompts), prompts).save(arguments.gallery)
    numbers = evaluate(lambda prompts: generate(model, prompts), arguments.count)
    print(markdown(numbers))
    found = measure_clip(CLIPTrainer.from_folder(arguments.preset / "clip"))
    print("CLIP, 256 held-out captions:", found)
    rows, shuffled = (numbers[name] for name in ("rows", "shuffled"))
    results = [
        ("one thing", rows["all held out, one thing"]["all"], ONE_BAR),
        ("two things", rows["all held out, two things"]["all"], TWO_BAR),
        ("another prompt, one thing", -shuffled["all held out, one thing"]["all"], -SHUFFLED_BAR),
        ("another prompt, two things", -shuffled["all held out, two things"]["all"], -SHUFFLED_BAR),
        ("CLIP, text to image", found["text_to_image@1"], RETRIEVAL_BAR),
        ("CLIP, image to text", found["image_to_text@1"], RETRIEVAL_BAR),
    ]
    size = sum(path.stat().st_size for path in arguments.preset.rglob("*") if path.is_file())
    print(f"{size:,} bytes, at most {MAX_BYTES:,}")
    failed = [name for name, share, bar in results if share < bar]
    failed += ["size"] if size > MAX_BYTES else []
    for name, share, bar in results:
        side = "at least" if bar > 0 else "at most"
        print(f"{name}: {abs(share):.1%}, {side} {abs(bar):.0%}")
    print(f"{len(results) + 1 - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
