"""A tokenizer and chat template of the shape that Hy3 was published with: added tokens that are not special, values of
arguments as JSON, the results of tools closed before whatever follows them, content in parts, and no generation prompt
behind an assistant. Tiny, and in words of its own.
"""

from corpora import udhr_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, PAD, USER, ASSISTANT, EOS = (
    "<｜hy_begin▁of▁sentence｜>",
    "<｜hy_▁pad▁｜>",
    "<｜hy_User｜>",
    "<｜hy_Assistant｜>",
    "<｜hy_eos｜>",
)
THINK, END_OF_THINK, REASONING_MODE = "<think>", "</think>", "<｜reasoning_mode｜>"
SPECIAL = (BOS, PAD, USER, ASSISTANT, EOS, "<｜hy_place▁holder▁no▁8｜>")
TOOL_TOKENS = tuple(
    f"<{slash}{name}>"
    for name in ("tool_calls", "tool_call", "tool_responses", "tool_response", "arg_key", "arg_value")
    for slash in ("", "/")
)
NAMED = (THINK, END_OF_THINK, REASONING_MODE, "<tool_sep>", *TOOL_TOKENS)  # by the template, but not special
UNNAMED = ("<answer>", "</answer>", "/think", "/no_think")

TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort in ('low', 'high') else 'no_think' -%}
{%- set mode = '<｜reasoning_mode｜>reasoning_effort:' ~ effort -%}
{%- macro shown(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content if part is string or part.type == 'text' -%}
            {{- part if part is string else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro called(call) -%}
    {{- '<tool_call>' ~ call['function']['name'] ~ '<tool_sep>\\n' -}}
    {%- for key, value in call['function']['arguments'].items() -%}
        {%- set text = value if value is string else value | tojson(ensure_ascii=False) -%}
        {{- '<arg_key>' ~ key ~ '</arg_key>\\n<arg_value>' ~ text ~ '</arg_value>\\n' -}}
    {%- endfor -%}
    {{- '</tool_call>\\n' -}}
{%- endmacro -%}
{%- set state = namespace(asked=-1, results=false, opened=false, blank=true) -%}
{{- '<｜hy_begin▁of▁sentence｜>' -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- shown(message.content) -}}
        {%- set state.blank = state.blank and not shown(message.content) -%}
    {%- elif message.role == 'user' -%}
        {%- set state.asked = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- ('' if state.blank else '\\n\\n') ~ '# Functions\\n\\nOne JSON object a line:\\n<tools>\\n' -}}
    {%- for tool in tools -%}
        {{- ('' if loop.first else '\\n') ~ (tool | tojson) -}}
    {%- endfor -%}
    {{- '\\n</tools>\\n\\nA call looks so:\\n<tool_calls>\\n<tool_call>{name}<tool_sep>\\n' -}}
    {{- '<arg_key>{key}</arg_key>\\n<arg_value>{value}</arg_value>\\n</tool_call>\\n</tool_calls>' -}}
{%- endif -%}
{{- mode -}}
{%- for message in messages -%}
    {%- if state.results and message.role in ('user', 'assistant') -%}
        {{- '</tool_responses>' -}}
        {%- set state.results = false -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- '<｜hy_User｜>' ~ shown(message.content) -}}
    {%- elif message.role == 'assistant' -%}
        {%- set thoughts = message.reasoning_content if message.reasoning_content is string else '' -%}
        {%- if not is_training and loop.index0 < state.asked -%}
            {%- set thoughts = '' -%}
        {%- endif -%}
        {{- '<｜hy_Assistant｜><think>' ~ thoughts ~ '</think>' ~ shown(message.content) -}}
        {%- if message.tool_calls -%}
            {%- set state.opened = false -%}
            {{- '<tool_calls>\\n' -}}
            {%- for call in message.tool_calls -%}
                {{- called(call) -}}
            {%- endfor -%}
            {{- '</tool_calls><｜hy_eos｜>' -}}
        {%- elif is_training or not loop.last -%}
            {{- '<｜hy_eos｜>' -}}
        {%- endif -%}
    {%- elif message.role == 'tool' -%}
        {{- '' if state.opened else '<tool_responses>\\n' -}}
        {{- '<tool_response>\\n' ~ shown(message.content) ~ '\\n</tool_response>\\n' -}}
        {%- set state.results = true -%}
        {%- set state.opened = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if state.results -%}
    {{- '</tool_responses>' -}}
{%- endif -%}
{%- if add_generation_prompt and messages and messages[-1].role != 'assistant' -%}
    {{- '<｜hy_Assistant｜><think>' ~ ('</think>' if effort == 'no_think' else '') -}}
{%- endif -%}
"""


def train_published_tokenizer(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; the added ones are the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + NAMED + UNNAMED),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(udhr_texts("en") + udhr_texts("zh"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NAMED + UNNAMED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
