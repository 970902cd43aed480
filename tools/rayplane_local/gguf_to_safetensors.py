"""Turn the one GGUF file below a folder into a model folder: `python gguf_to_safetensors.py SOURCE TARGET`.

Runs in the serving environment. The weights are dequantized to bfloat16; the tokenizer comes out of the same file.
"""

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found,unused-ignore]
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found,unused-ignore]


def main(source: Path, target: Path) -> None:
    (file,) = source.rglob("*.gguf")
    config = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
