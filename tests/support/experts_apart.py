"""Tiny models with one module per routed expert, as transformers 4 and files on the hub have them."""

import torch
from support.models import expert_modules


class Expert(torch.nn.Module):
    """One gated expert; ``names`` are those of its three layers: gate, up, down."""

    def __init__(self, gate_up, down, act_fn, names):
        super().__init__()
        self.names, self.act_fn = names, act_fn
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.detach().clone()
            self.add_module(name, layer)

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Experts(torch.nn.ModuleList):
    """The experts of a layer, called as those of transformers 5."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, rank = torch.where(top_k_index == number)
            output.index_add_(0, token, expert(hidden_states[token]) * top_k_weights[token, rank, None])
        return output


class ExpertsApart(torch.nn.Module):
    """A causal language model with one module per expert, under the names that files use.

    Its class has no config, so that PEFT takes it for none of transformers' models and converts nothing: it adapts the
    modules and weights that an adapter's settings name, as it did with transformers 4.
    """

    def __init__(self, model):
        super().__init__()
        mixtral = model.config.model_type == "mixtral"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for place, stacked in expert_modules(model).items():
            pairs = zip(stacked.gate_up_proj, stacked.down_proj, strict=True)
            model.set_submodule(place, Experts(Expert(*pair, stacked.act_fn, names) for pair in pairs))
        self.model, self.lm_head = model.model, model.lm_head
        for layer in self.model.layers if mixtral else ():
            layer.block_sparse_moe = layer._modules.pop("mlp")
            layer.__dict__["mlp"] = layer.block_sparse_moe  # the name that the layer's forward calls

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids).last_hidden_state)
