"""Train the `shapes` model: `python -m kdiffusion.shapes --out FOLDER`."""

from kdiffusion.shapes.stages import main

if __name__ == "__main__":
    main()
