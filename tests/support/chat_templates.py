"""Short equivalents of the structure of public chat templates, each with its special tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class PublicTemplate:
    """A template, its added tokens (special ones, and others), and its start and end tokens."""

    text: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|im_end|>"

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A byte-level tokenizer with the template and its tokens."""
        tokenizer = byte_level(chat_template=self.text)
        names = dict.fromkeys([*self.special, *([self.bos] if self.bos else []), self.eos])
        tokenizer.add_special_tokens({"extra_special_tokens": list(names)})
        tokenizer.add_tokens(list(self.added))
        tokenizer.eos_token, tokenizer.bos_token = self.eos, self.bos
        return tokenizer


_CALL = '{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) + \'}'
_ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + _ASKED

QWEN2_5 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- else %}{{- 'You are a helpful assistant.' }}{%- endif %}{{- '\n# Tools\n<tools>' }}{%- for tool in tools %}"
    "{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not (tools and loop.first)) "
    "or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\n' + m.content }}"
    "{%- endif %}{%- for call in m.tool_calls %}{{- '\n<tool_call>\n" + _CALL + "\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}" + _ASKED
)

QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set text = m.content %}"
    "{%- set thought = '' %}{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + text }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}" + _ASKED
)

QWEN3_THINKING = QWEN3.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}"
    "{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip()"
    " + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim "
    "+ '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA_3_ALWAYS = LLAMA_3.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
"""Asks the assistant after every chat, as the first version did."""

LLAMA_3_1 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- set system = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system"
    " + '<|eot_id|>' }}"
    "{%- if tools is defined and tools is not none %}{%- set first = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{{- first"
    " + '<|eot_id|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in m %}{%- if m.tool_calls | length != 1 %}"
    "{{- raise_exception('one tool-call at once!') }}"
    "{%- endif %}{%- set call = m.tool_calls[0].function %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- m.content | tojson }}{{- '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

MISTRAL_NEMO = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}{%- for m in rest %}"
    "{%- if m.role == 'user' %}{%- if tools is not none and m == asked[-1] %}{{- '[AVAILABLE_TOOLS]'"
    " + (tools | tojson) "
    "+ '[/AVAILABLE_TOOLS]' }}{%- endif %}{%- if loop.last and system is defined %}"
    "{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}{%- else %}{{- '[INST]' + m.content"
    " + '[/INST]' }}{%- endif %}"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[TOOL_CALLS][' }}"
    "{%- for call in m.tool_calls %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] }}"
    "{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should have length 9!') }}"
    "{%- endif %}{{- ', \"id\": \"' + call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']'"
    " + eos_token }}"
    "{%- endif %}{%- endfor %}{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"
)

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m.role %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA_3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- if messages[0].content is string -%}"
    "{%- set prefix = messages[0].content + '\n\n' -%}{%- else -%}{%- set prefix = messages[0].content[0].text"
    " + '\n\n' -%}"
    "{%- endif -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}"
    "{%- endif -%}"
    "{%- for m in rest -%}{%- set role = 'model' if m.role == 'assistant' else m.role -%}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}{%- if m.content is string -%}"
    "{{ m.content | trim }}{%- else -%}{%- for part in m.content -%}{%- if part.type == 'image' -%}"
    "{{ '<start_of_image>' }}{%- elif part.type == 'text' -%}{{ part.text | trim }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{% set text = m.content %}{% if '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + text + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

DEEPSEEK_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content"
    " + '<｜tool▁output▁end｜>' }}"
    "{% elif m.tool_calls %}{{ '<｜Assistant｜>' + (m.content or '') + '<｜tool▁calls▁begin｜>' }}"
    "{% for call in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments "
    "+ '\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

HARMONY = (
    "{{- '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{%- if messages[0].role in ['developer', 'system'] %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- for m in rest -%}{%- if m.role == 'assistant' -%}{%- if 'tool_calls' in m -%}"
    "{%- set call = m.tool_calls[0].function -%}"
    "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{%- endif %}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}"
    "{{- call.arguments | tojson }}{{- '<|call|>' }}"
    "{%- elif loop.last and not add_generation_prompt -%}"
    "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif -%}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' }}{{- m.content | tojson }}"
    "{{- '<|end|>' }}"
    "{%- else -%}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' }}{%- endif -%}"
)

COMMAND_R = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

COMMAND_R7B = COMMAND_R.replace(
    "<|CHATBOT_TOKEN|>' + m.content.strip() + '<",
    "<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content.strip() + '<|END_RESPONSE|><",
)

GRANITE = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}{%- else %}"
    "{%- set system = 'You are Granite.' %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}"
    "{{- '<|end_of_text|>\n' }}"
    "{%- endif %}{%- for m in rest %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content"
    " + '<|end_of_text|>\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
    "{%- endif %}{%- endfor %}"
)

SMOLLM3 = (
    "{%- set mode = '/no_think' %}{%- if messages[0].role == 'system' and '/think' in messages[0].content %}"
    "{%- set mode = '/think' %}{%- endif %}{{- '<|im_start|>system\nReasoning Mode: ' + mode + '\n' }}"
    "{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() }}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{% generation %}{%- if mode == '/think' %}"
    "{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}"
    "{% endgeneration %}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{%- if mode == '/think' %}"
    "{{- '<|im_start|>assistant\n' }}{%- else %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' }}"
    "{%- endif %}{%- endif %}"
)

OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '|>\n' + m.content"
    " + '\n' }}"
    "{% elif not loop.last %}{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ 'USER: '"
    " + m.content.strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}{% else %}{{ m.content"
    " + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

XML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{% for name, value in call.function.arguments | items %}"
    "{{ '<parameter=' + name + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}"
    "{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _ASKED
)

_INST = ("[INST]", "[/INST]")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_COMMAND_R = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
)
_QWEN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK_TOOLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end", "output▁begin", "output▁end")
)

PUBLIC_TEMPLATES: dict[str, PublicTemplate] = {
    "chatml": PublicTemplate(text=CHATML),
    "qwen2.5": PublicTemplate(text=QWEN2_5, added=_QWEN),
    "qwen3": PublicTemplate(text=QWEN3, added=_QWEN),
    "qwen3_thinking": PublicTemplate(text=QWEN3_THINKING, added=_QWEN),
    "llama2": PublicTemplate(text=LLAMA_2, bos="<s>", eos="</s>"),
    "llama3": PublicTemplate(text=LLAMA_3, special=_LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "llama3_always": PublicTemplate(
        text=LLAMA_3_ALWAYS, special=_LLAMA_3, bos="<|begin_of_text|>", eos="<|end_of_text|>"
    ),
    "llama3.1": PublicTemplate(text=LLAMA_3_1, special=_LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "mistral_nemo": PublicTemplate(
        text=MISTRAL_NEMO, special=(*_INST, "[TOOL_CALLS]", "[TOOL_RESULTS]"), bos="<s>", eos="</s>"
    ),
    "gemma2": PublicTemplate(text=GEMMA_2, special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>"),
    "gemma3": PublicTemplate(text=GEMMA_3, special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>"),
    "phi3": PublicTemplate(
        text=PHI_3, special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>"
    ),
    "zephyr": PublicTemplate(text=ZEPHYR, bos="<s>", eos="</s>"),
    "r1": PublicTemplate(text=R1, added=(*_DEEPSEEK, "<think>", "</think>"), bos="<s>", eos="<｜end▁of▁sentence｜>"),
    "deepseek_v3": PublicTemplate(
        text=DEEPSEEK_V3, added=(*_DEEPSEEK, *_DEEPSEEK_TOOLS), bos="<s>", eos="<｜end▁of▁sentence｜>"
    ),
    "harmony": PublicTemplate(
        text=HARMONY,
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        eos="<|return|>",
    ),
    "command_r": PublicTemplate(text=COMMAND_R, special=_COMMAND_R, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"),
    "command_r7b": PublicTemplate(text=COMMAND_R7B, special=_COMMAND_R, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"),
    "granite": PublicTemplate(text=GRANITE, special=("<|start_of_role|>", "<|end_of_role|>"), eos="<|end_of_text|>"),
    "smollm3": PublicTemplate(text=SMOLLM3, added=_QWEN),
    "olmo2": PublicTemplate(text=OLMO, bos="<|endoftext|>", eos="<|endoftext|>"),
    "vicuna": PublicTemplate(text=VICUNA, bos="<s>", eos="</s>"),
    "alpaca": PublicTemplate(text=ALPACA, eos="</s>"),
    "xml_tools": PublicTemplate(text=XML_TOOLS, added=_QWEN),
}
"""Name -> template; the names are those of the model families whose structure each has."""


def messages(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    """Messages of roles and contents; u, a, s and t stand for the usual roles."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": names.get(role, role), "content": text} for role, text in turns]
