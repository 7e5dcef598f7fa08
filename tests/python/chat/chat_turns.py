"""Messages in a word each, and a made-up release with its texts."""

from __future__ import annotations

from pathlib import Path

from dsv4_ascend.chat.release_texts import ReleaseTexts

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

RELEASE = '''"""Made-up texts of a made-up release."""
import sys
TOOLS_TEMPLATE = """## Tools
{dsml_token}tool_calls, {thinking_start_token}, {thinking_end_token}
{tool_schemas}
End {tool_schemas.__class__} {0} {unknown}"""
REASONING_EFFORT_MAX: str = "Think hard.\\n\\n"
response_format_template = ("## Response Format:\\n"
                            "{schema}")
NUMBER, joined = 3, "a" + "b"
'''
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für einen Ort"},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def texts_of(folder: Path, source: str) -> ReleaseTexts:
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")
    return ReleaseTexts.from_folder(folder)


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(
    content: str | None, reasoning: str | None = None, calls: list | None = None, **more
) -> dict:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
        **more,
    }


def tool(content: object, call: str = "") -> dict:
    return {"role": "tool", "content": content, "tool_call_id": call}


def call(name: str, arguments: str, identity: str | None = None) -> dict:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
