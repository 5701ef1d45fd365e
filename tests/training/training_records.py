"""Records of every mix of modalities, in both formats; their media are those of the fixture `media_folder`."""


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# One record of every mix, in the two formats.
RECORDS = [
    {"image": "image0.png", "conversations": turn("<image>\nwhat is the", "a cat")},
    {"video": ["frame0.png", "frame1.png"], "conversations": turn("<video>\nwhat", "the end")},
    {"voice": "audio.wav", "conversations": turn("<audio>\nwhat", "a bell")},
    {"speech": ["speech.wav"], "conversations": turn("<speech>", "hello")},
    {"conversations": turn("what is the", "is what") + turn("the", "no")},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "image1.png"}, {"type": "text", "text": "the"}]},
            {"role": "assistant", "content": "what"},
        ]
    },
    {
        "image": ["image2.png", "image3.png"],
        "voice": ["audio.wav", "speech.wav"],
        "conversations": turn("<image><audio>\n<image> is <speech>", "all"),
    },
]
