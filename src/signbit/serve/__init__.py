"""Using a model: text generation and chat, with transformers' own generate, streamers and chat templates."""

from signbit.serve.chat import chat
from signbit.serve.generate import Generated, GenerateOptions, generate

__all__ = ["GenerateOptions", "Generated", "chat", "generate"]
