"""The README.md of a converted folder: where it comes from, what may be done with it, how it is run."""

from .family import Conversion

EXAMPLES = {
    "image": ("cat.jpg", "What is in the image?"),
    "video": ("clip.mp4", "What happens in the video?"),
    "audio": ("rain.wav", "Which sounds can be heard?"),
    "speech": ("question.wav", "Answer the spoken question."),
}
OTHER_LICENCES = ("research-only",)
TEMPLATE = """\
---
library_name: transformers
pipeline_tag: any-to-any
tags:
- unimoe
- mixture-of-experts
{licence_header}
---

# {title}, converted for Transformers

The weights of {title} in the layout of the `unimoe` package, converted without training or other changes
{from_what}. Takes {takes} and answers with text.

## Licence notice

{licence}

## Use

```python
from transformers import pipeline{with_package}

pipe = pipeline("any-to-text", model="{model}", trust_remote_code=True)
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "{modality}", "path": "{file}"}},
            {{"type": "text", "text": "{question}"}},
        ],
    }}
]
print(pipe(messages, return_full_text=False)[0]["generated_text"])
```

Or with the classes themselves:

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{model}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{model}", trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
output = model.generate(**inputs.to(model.device))
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{code_note}

## Architecture

```
{architecture}
```

## Conversion

{inputs}

Weights are stored as {dtype}. {notes}
"""


def model_card(conversion: Conversion, architecture: str, model: str, dtype: str, remote_code: bool) -> str:
    """The text of the card.

    Args:
        architecture: What `unimoe info` prints.
        model: How the snippets name the model: the repository or the folder.
        dtype: Of the stored weights.
        remote_code: Whether the folder brings its code along.
    """
    modalities = conversion.config.input_modalities
    modality = modalities[0] if modalities else "text"
    file, question = EXAMPLES.get(modality, ("", "Hello!"))
    code_note = (
        "The folder brings its code along, so `trust_remote_code=True` suffices; with the `unimoe` package installed and "
        "imported (`import unimoe`), the installed code is used."
        if remote_code
        else "The folder holds no code: install the `unimoe` package and import it first (`import unimoe`)."
    )
    text = TEMPLATE.format(
        licence_header=_licence_header(conversion.licence_id),
        title=conversion.title,
        from_what="from the files named below",
        takes=", ".join(("text", *modalities)),
        licence=conversion.licence,
        model=model,
        modality=modality,
        file=file,
        question=question,
        with_package="" if remote_code else "\n\nimport unimoe",
        code_note=code_note,
        architecture=architecture,
        inputs="\n".join(f"- {option.replace('_', ' ')}: `{path.name}`" for option, path in conversion.inputs.items()),
        dtype=dtype,
        notes=" ".join(conversion.notes),
    ).rstrip()
    return (text if remote_code else text.replace(", trust_remote_code=True", "")) + "\n"


def _licence_header(licence_id: str) -> str:
    """The Hub knows common licences by their names; any other needs two lines."""
    return f"license: other\nlicense_name: {licence_id}" if licence_id in OTHER_LICENCES else f"license: {licence_id}"
