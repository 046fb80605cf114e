"""Conversations as models read them: chat templates, tokenizers, rendering.

No weights are loaded here. Front door: `template`.
"""
