"""Chat templates that render the official prompts, one constant a family.

A template is a Jinja text that is saved beside the processor (`chat_template.jinja`). What the assistant says stands
inside `{% generation %}`, so that training can tell answers from questions.
"""

# Uni-MoE v1, the "vicuna_v1" conversation: one space after the system text and after a user turn, "</s>" and nothing
# else after an answer, "ASSISTANT:" without a trailing space where the answer is still to come. Each medium stands
# where it is in the content, with a line feed behind it. A first system message replaces the system text.
UNI_MOE_CHAT_TEMPLATE = r"""
{%- set system = "A chat between a curious user and an artificial intelligence assistant. " ~
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for block in content -%}
            {{- block['text'] if block['type'] == 'text' else '<' ~ block['type'] ~ '>\n' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = render(messages[0]['content']) -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{{- system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ render(message['content']) ~ ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ render(message['content']) ~ '</s>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("role '" ~ message['role'] ~ "': only 'user' and 'assistant', and 'system' first.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

# MoE-LLaVA: the same conversation, closed by the tokenizer's own end token ("<|endoftext|>" of StableLM, Qwen and Phi,
# "<|end_of_turn|>" of OpenChat, "</s>" of Mistral). Only the last of several media in a row has a line feed behind it, and a
# turn's only medium is moved to its front, as the original's training does.
MOE_LLAVA_CHAT_TEMPLATE = r"""
{%- set system = "A chat between a curious user and an artificial intelligence assistant. " ~
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- set media = content | rejectattr('type', 'equalto', 'text') | list -%}
        {%- if media | length == 1 and content[0]['type'] == 'text' -%}
            {{- '<' ~ media[0]['type'] ~ '>\n' -}}
            {{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim -}}
        {%- else -%}
            {%- for block in content -%}
                {%- if block['type'] == 'text' -%}
                    {{- block['text'] -}}
                {%- else -%}
                    {{- '<' ~ block['type'] ~ '>' ~ ('' if loop.nextitem and loop.nextitem['type'] != 'text' else '\n') -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = render(messages[0]['content']) -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{{- system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ render(message['content']) ~ ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ render(message['content']) ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("role '" ~ message['role'] ~ "': only 'user' and 'assistant', and 'system' first.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

# CuMo, the "mistral_instruct_system" conversation: "<s>" is written out although the tokenizer puts another one before it;
# the system text stands inside the first question; an answer has a space before and behind it. With an empty system message
# this is "mistral_instruct". A turn's only image is moved to its front, as the original's training does; several stay where
# they are. An answer before the first question is left out.
CUMO_CHAT_TEMPLATE = r"""
{%- set system = "A chat between a curious user and an artificial intelligence assistant. " ~
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- set media = content | rejectattr('type', 'equalto', 'text') | list -%}
        {%- if media | length == 1 and content[0]['type'] == 'text' -%}
            {{- '<' ~ media[0]['type'] ~ '>\n' -}}
            {{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim -}}
        {%- else -%}
            {%- for block in content -%}
                {{- block['text'] if block['type'] == 'text' else '<' ~ block['type'] ~ '>\n' -}}
            {%- endfor -%}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = render(messages[0]['content']) -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if turns and turns[0]['role'] == 'assistant' -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{{- '<s>' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' -}}
        {%- if loop.first and system -%}
            {{- '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' -}}
        {%- endif -%}
        {{- render(message['content']) ~ ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- ' ' ~ render(message['content']) ~ ' </s>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("role '" ~ message['role'] ~ "': only 'user' and 'assistant', and 'system' first.") -}}
    {%- endif -%}
{%- endfor -%}
"""

DEFAULT_CHAT_TEMPLATE = UNI_MOE_CHAT_TEMPLATE
