"""What config.json of the two published models says of their shapes."""

PUBLISHED = {
    "Hy-MT2-30B-A3B": dict(
        hidden_size=2048,
        intermediate_size=6912,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
    )
    | dict(moe_intermediate_size=768, expert_hidden_dim=768, head_dim=128, vocab_size=120832, num_experts_per_tok=8),
    "Hy3": dict(
        hidden_size=4096,
        intermediate_size=13312,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_experts=192,
    )
    | dict(moe_intermediate_size=1536, expert_hidden_dim=1536, head_dim=128, vocab_size=120832, num_experts_per_tok=8),
}
