"""Small chat templates in the manner of Qwen3's: with tools, with thinking, and with a tag that is already open."""

from __future__ import annotations

TOOLS = """
{%- if tools %}
{{- '<|im_start|>system\\nTools, called as <tool_call>{"name": …, "arguments": …}</tool_call>:\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.reasoning_content %}{{- '(thought: ' + message.reasoning_content + ')' }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

THINKING = (
    TOOLS
    + """
{%- if enable_thinking is defined and not enable_thinking and add_generation_prompt %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
)

OPEN_THINKING = TOOLS + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
