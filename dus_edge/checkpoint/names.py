"""Names of the files that make a checkpoint folder, as transformers writes them."""

CONFIG = "config.json"
#: What a base begins with that is a model of Ollama's.
OLLAMA = "ollama:"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: What users of sha256sum call a file of digests.
DIGESTS = "SHA256SUMS"
#: One JSON object a step of a training run.
TRAINING_LOG = "log.jsonl"
QUANTIZE_CONFIG = "quantize_config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
#: Plot of a healing, in the result's folder.
RECOVERY_PLOT = "recovery.svg"
