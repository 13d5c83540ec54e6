"""What the experiment is made of, one module a question. `docs/design.md` shows how they fit together."""
