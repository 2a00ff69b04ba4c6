"""The web demo: `transdiff demo`, or the same `app.py` as a Hugging Face Space. It needs the extra `demo` (Gradio)."""

from .app import build, launch


__all__ = ["build", "launch"]
