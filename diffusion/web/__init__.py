"""Pages in a browser: drawing pictures, and watching a training run."""
