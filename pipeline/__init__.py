"""A Constitutional-AI pipeline: prompts in; critiqued, revised, ranked records and datasets out."""
