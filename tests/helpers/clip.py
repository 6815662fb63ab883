"""Tiny models of pictures and text, in folders, as transformers' AutoModel reads them."""

import string

import torch
import transformers as tf

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PICTURES = TOWER | {"image_size": 16, "patch_size": 8}


def tokenizer():
    """Letters are the tokens."""
    letters = [*string.ascii_lowercase, "."]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    return tf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def model_in(folder, kind):
    """Save a model of random weights, whose probabilities differ between pictures."""
    torch.manual_seed(0)
    tokens = tokenizer()
    sizes = {"vocab_size": len(tokens), "max_position_embeddings": 32}
    ends = {f"{k}_token_id": getattr(tokens, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text, square = TOWER | sizes | ends, {"height": 16, "width": 16}
    if kind == "clip":
        config = tf.CLIPConfig(text_config=text, vision_config=PICTURES, projection_dim=8)
        model = tf.CLIPModel(config)
        pictures = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
        processor = tf.CLIPProcessor(image_processor=pictures, tokenizer=tokens)
    else:
        text["projection_size"] = 16
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=PICTURES))
        pictures = tf.SiglipImageProcessor(size=square)
        processor = tf.SiglipProcessor(image_processor=pictures, tokenizer=tokens)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embedding" not in name:
                weight.normal_(0, 0.4)
        model.logit_scale.fill_(2.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
