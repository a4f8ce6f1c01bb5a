"""The words in which a model is described: which attribute of a module plays which part.

A spec holds names and choices, no modules and no tensors: it belongs to a class of modules, is read
once when a model is patched, and stays true when parts are exchanged (an adapter), copied or saved.
What is computed by it stands in `fastvlm.run`. arguments: of a module's forward, by place, behind
its first; the cache among them is called past_key_values, whatever transformers calls it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """A module with q_proj, k_proj, v_proj and `out`, over heads of its head_dim.

    out: None where the layer has it (`Residual.project`). fused: the one layer that gives, side by
    side, queries, keys and values; of a class that always reads states keys and values, beside a
    q_proj; None where each has its own. scale: the attribute with what scores are multiplied with;
    None for the root of 1 / head_dim. dropout: an attribute, a number or a module. out_dropout: the
    module that drops of what `out` gives, where that is not the layer's business.
    states: the argument with the encoder's states; None where rows only read themselves. cross:
    whether they are always there; otherwise rows read themselves without them. causal: the
    attribute that says whether rows see only those before them; None where they always do, and a
    module does not tell which of the two it is for. rotary: whether queries and keys are turned by
    their positions (RoPE). way: the attribute that says by which of a stack's tables, where it has
    several (`Stack.ways`). norms: the modules that normalize each head of queries and of keys,
    before that. window, softcap: the attributes with these numbers; None where the class has none.
    splits_window: whether a window that reaches both ways is half before a row and half behind it.
    merged: whether rows read themselves and the states in one softmax, keys and values of both by
    the same projections, and only their own turned. mask: what it calls its mask. bias: the table
    of a bias of the scores by distance; of a class that shares_bias the first of a stack has it,
    and hands what it read on to the others. keeps_states: whether a call without states reads those
    whose keys its cache holds. aliases: what is called so here, and what the class calls it.
    """

    out: str | None
    arguments: tuple[str, ...]
    dropout: str
    scale: str | None = "scaling"
    fused: str | None = None
    out_dropout: str | None = None
    states: str | None = None
    cross: bool = False
    causal: str | None = "is_causal"
    rotary: bool = False
    way: str | None = None
    norms: tuple[str, str] | None = None
    window: str | None = None
    softcap: str | None = None
    splits_window: bool = False
    merged: bool = False
    mask: str = "attention_mask"
    bias: str | None = None
    shares_bias: bool = False
    keeps_states: bool = False
    aliases: tuple[tuple[str, str], ...] = ()

    def name(self, ours: str) -> str:
        """What the class calls a part."""
        return dict(self.aliases).get(ours, ours)


@dataclass(frozen=True)
class Mlp:
    """down(act(up x)), or with a gate down(act(gate x) * up x).

    activation: its name in the ops. evaluated: the kind of the module that was found to compute it
    (`fastvlm.nn.mlp.kind_of`). dropout: of what `down` reads, a number or a module. out_dropout:
    the module that drops of what it gives. Names lead to parts of parts: "output.dense".
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    activation: str = "gelu"
    evaluated: str = ""
    dropout: str | None = None
    out_dropout: str | None = None


@dataclass(frozen=True)
class Residual:
    """h -> norm(h + tanh(gate) * after(branch(before(h)))): a branch, and how it joins the stream.

    reads: "self" for attention of rows to themselves, "cross" to the encoder's states, "merged" to
    both at once, "mlp".
    branch: the module that computes it, or the Mlp whose parts are the layer's own. before, after,
    norm: norms of what the branch reads, of what it gives, of the sum; None where there is none.
    optional: a cross-attention that is left out where there are no states to read. dropout: of what
    the branch gives, where it has one of its own. project: the linear layer behind an attention
    that has none. factors: the argument of the layer, [B, 1, L, 1], with what the rows that a
    branch gives are multiplied with. Names lead to parts of parts: "layer.0.dropout".
    """

    reads: str
    branch: str | Mlp
    before: str | None = None
    after: str | None = None
    norm: str | None = None
    gate: str | None = None
    optional: bool = False
    dropout: str | None = None
    project: str | None = None
    factors: str | None = None


@dataclass(frozen=True)
class Layer:
    """Branches, one after the other.

    dropout: of what a branch gives, a number or a module. states: by what name cross-attention
    gets the encoder's; given: by what name the layer itself does. hands: the arguments that all
    attentions get as well. named: whether they
    get the rows by name. splits_cache: whether self-attention gets its part of a cache alone.
    clamps: where float16 is kept off its ends, "always" or "overflow": only if something left them,
    "infinite": behind each branch, only if something is. mask: what attentions call theirs, and the
    layer too where its own is of that name; cross_mask: what those that read the encoder do, where
    they have another name for it.
    shares_bias: it gets `position_bias` and gives a tuple of as many parts as `results` says: rows,
    the bias of its first attention, and nothing.
    bypasses: where it is handed no layouts its own forward runs: modules with forwards of their own
    stand between it and its branches, or what they get from it is not all that it is given.
    handed: the argument that holds the layouts where its stack hands down no others (`Stack`).
    in_tuple: whether the rows are the only part of a tuple.
    """

    residuals: tuple[Residual, ...]
    arguments: tuple[str, ...]
    dropout: str | None = None
    states: str = "encoder_hidden_states"
    given: str = "encoder_hidden_states"
    hands: tuple[str, ...] = ()
    named: bool = False
    splits_cache: bool = True
    clamps: str | None = None
    handed: str | None = None
    in_tuple: bool = False
    mask: str = "attention_mask"
    cross_mask: str | None = None
    shares_bias: bool = False
    results: int = 3
    bypasses: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The attributes with its branches that are modules, its norms and gates."""
        named = ((r.branch, r.before, r.after, r.norm, r.gate) for r in self.residuals)
        return tuple(name for names in named for name in names if isinstance(name, str))


@dataclass(frozen=True)
class Embedding:
    """tokens' rows, times the root of the hidden size if scaled, plus positions, normalized.

    factor: the attribute of the stack with another number that the rows are multiplied with.
    given: whether position_ids name the rows of positions, where there are any; otherwise columns
    do. offset: the
    attribute of the table with the row of the first column; None for its first row. counts_tokens:
    whether the module of positions counts them itself in the token ids it is called with, padding
    left out. norm_first: whether positions are added behind the norm. skips: the attribute with a
    pad id, where tokens that are given no position are counted from behind it, and pads are not.
    types: a table whose first row is added to tokens, unless the arguments `told` say which; with
    one of those modules are called. holder: the module that does all this, where it is one.
    """

    tokens: str = "embed_tokens"
    scaled: bool = False
    factor: str | None = None
    positions: str | None = None
    given: bool = False
    offset: str | None = "offset"
    counts_tokens: bool = False
    norm: str | None = None
    norm_first: bool = False
    skips: str | None = None
    types: str | None = None
    told: tuple[str, ...] = ()
    holder: str | None = None


@dataclass(frozen=True)
class Stack:
    """Layers between an embedding and a norm.

    attentions: of each layer, that of its own rows first; interleaved: a layer has one of them
    alone, and one cache holds the keys of both kinds. states: the arguments with the encoder's
    states and their mask. rotary: the module with RoPE's tables.
    hides_pads: whether pad tokens are padding where no mask is given. masks, cross_masks: the kinds
    of masks that layers choose from; none where all get the same. trains_cached: whether a cache is
    made in training where none is asked for. reads: its first argument, "input_features" for frames
    of which none is padding. reshapes: whether it gives its rows the shape of what it was given.
    empty_mask: whether it takes a mask of four dimensions as it is, and makes one where it gets
    none. warns: whether it says so where pads come without a mask. ignores_mask: it takes a mask of
    them and never looks at it.
    drops_cache: whether layers get no cache where use_cache is False. hands: the argument that
    reaches its layers where those that it does not know do not; None where they do. aliases: as of
    an `Attention`. has_bias: whether scores have a bias of the distance, in columns. causal: where
    a call says whether rows see only those before them, an argument or "config." and its name; None
    where they always do. holders: modules of a layer whose parts our layer reads, and which it does
    not call. by_layers: whether its layers as they are hand nothing on to their attentions.
    ignores_cross_mask: the mask of the encoder's states is never looked at. ways: whether layers of
    each kind of its config's layer_types have cosines and sines of their own. merged: whether its
    attentions read the encoder's states beside their own rows. on_cpu: what of its attentions only
    the CPU has kernels for; None where others do. wraps_cache: whether it
    takes a cache of its own rows alone, and makes one for the encoder's beside it. head: the module
    in it that makes logits of what it gives, which it makes a loss of where it gets labels.
    """

    embedding: Embedding
    arguments: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ("self_attn",)
    interleaved: bool = False
    states: tuple[str, str] = ("encoder_hidden_states", "encoder_attention_mask")
    norm: str | None = None
    rotary: str | None = None
    hides_pads: bool = False
    masks: tuple[str, ...] = ()
    cross_masks: tuple[str, ...] = ()
    trains_cached: bool = True
    reads: str = "input_ids"
    reshapes: bool = False
    empty_mask: bool = False
    warns: bool = False
    ignores_mask: bool = False
    drops_cache: bool = False
    hands: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    has_bias: bool = False
    causal: str | None = None
    holders: tuple[str, ...] = ()
    by_layers: bool = False
    ignores_cross_mask: bool = False
    wraps_cache: bool = False
    ways: bool = False
    merged: bool = False
    on_cpu: str | None = None
    head: str | None = None

    @property
    def reads_encoder(self) -> bool:
        return self.merged or len(self.attentions) > 1

    @property
    def decodes(self) -> bool:
        """Whether its rows see only those before them: it may be given a cache."""
        return "use_cache" in self.arguments

    @property
    def masks_encoder(self) -> bool:
        """Whether it takes a mask of the encoder's states."""
        return self.states[1] in self.arguments

    @property
    def packs_ids(self) -> bool:
        """Whether it takes packed token ids with their positions; otherwise its layers pack."""
        return self.rotary is not None or self.reshapes
