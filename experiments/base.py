"""Every knob of a run, set to its default: the file to copy for an experiment of your own.

Claim: none; write what your experiment is to show. Delete every line that you do not change: a default lives
in the dataclass field, and `jaxlm config` prints them all.
Command: jaxlm train --config=experiments/base.py --workdir=runs/base --config.data.train='my/*.txt'
Hardware: one CPU core.
Expected: not run yet; this file is for copying.
Last run: none.

`:smoke` trains on Python's own source code, byte tokens, for a few steps on a CPU.
"""

import os

from ml_collections import ConfigDict

from jaxlm.config import default_config
from jaxlm.errors import check_choice


def get_config(size: str = "full") -> ConfigDict:
    check_choice(size, ("full", "smoke"), "--config: size after the colon")
    config = default_config()

    config.seed = 0  # of parameters and dropout; the order of the data has its own, data.seed

    # Shape and variations of a transformer stack.
    model = config.model
    model.vocab_size = 256  # V
    model.num_layers = 4  # L
    model.shared_layers = 1  # layers in a row (periods of the pattern) with the same parameters (ALBERT)
    model.model_dim = 128  # D
    model.embed_dim = 0  # E of tables that a linear layer projects to D (ALBERT); 0 = D, and no such layer
    model.mlp_dim = 0  # F, width of a dense MLP; 0 = 4 D
    model.mlp_pattern = ("dense",)  # one period of layers, each 'dense' or 'moe'
    # so many first layers have a dense MLP; mlp_pattern begins after them (DeepSeek)
    model.first_dense = 0
    model.activation = "swiglu"  # name in jaxlm.model.layers.ACTIVATIONS
    model.mlp_bias = False  # biases in the dense MLPs
    # c: gated MLPs become act(min(g, c)) (clip(h, -c, c) + 1); 0 = off (GPT-OSS: 7)
    model.gate_limit = 0.0
    model.norm = "rmsnorm"  # rmsnorm | layernorm
    model.norm_eps = 1e-06  # added to the variance
    model.norm_offset = False  # norms multiply by 1 + scale (Gemma)
    model.norm_position = "pre"  # pre: x + f(n(x)) | post: n(x + f(x)) | branch: x + n(f(x)) | sandwich: both
    model.parallel_block = False  # x + attention(n(x)) + mlp(n(x)), one norm (GPT-J, PaLM)
    model.parallel_norms = False  # the MLP of a parallel block has a norm of its own (GPT-NeoX)
    model.embed_norm = False  # a norm right after the embeddings (BLOOM, BERT)
    model.head_bias = False  # a bias on the logits
    model.head_transform = False  # a dense layer, the activation and a norm before the logits (BERT)
    model.token_types = 0  # embeddings of the kinds of tokens, such as first and second sentence; 0 = none
    model.tie_embeddings = False  # the head is the embedding table
    model.scale_embeddings = False  # embeddings times sqrt(D) (Gemma)
    model.logit_scale = 1.0  # logits are multiplied by it
    model.logit_softcap = 0.0  # logits become c tanh(logits / c); 0 = off
    model.dropout = 0.0  # of the embeddings and of each branch before it is added
    model.causal = True  # False: every position sees its whole segment
    model.init_std = 0.02  # of weights; 0 = fan_in ** -0.5
    # standard | mup | completep: how a wider or deeper model differs
    model.parametrization = "standard"
    model.base_width = 0  # mup, completep: model_dim of the model that lr and init_std were tuned on
    model.base_depth = 0  # completep: num_layers of that model
    # mup, completep: its head_dim; 0 = attention.head_dim (width adds heads)
    model.base_head_dim = 0
    model.scan = True  # lax.scan over the layers, or an unrolled loop
    model.remat = "none"  # none | minimal | full | offload | offload_minimal, see jaxlm.stack.REMAT
    model.dtype = "float32"  # operands of products, and activations
    model.param_dtype = "float32"  # stored parameters
    model.accum_dtype = "float32"  # sums inside products
    # none | int8 | int8_full | fp8: 8-bit products of dense layers, see jaxlm.quant
    model.quant = "none"

    model.attention.num_heads = 4  # query heads N
    model.attention.num_kv_heads = 0  # key/value heads K, a divisor of num_heads (1 = MQA); 0 = num_heads
    model.attention.head_dim = 0  # H; 0 = model_dim / num_heads
    model.attention.pattern = ("global",)  # one period of layers, each 'global' or 'local'
    model.attention.window = 0  # tokens that a local layer sees, itself included
    model.attention.softcap = 0.0  # scores become c tanh(scores / c); 0 = off (Gemma 2)
    model.attention.qk_norm = False  # normalise queries and keys before the rotation
    model.attention.qk_norm_kind = "rmsnorm"
    model.attention.qk_norm_over = (
        "head"  # head | heads (each with a scale of its own) | all (of them together)
    )
    model.attention.clip_qkv = 0.0  # queries, keys and values, normalised ones too, are clipped to this
    # one learned extra logit a head that takes weight and gives nothing (GPT-OSS)
    model.attention.sinks = False
    model.attention.qkv_bias = False  # biases on the query, key and value projections
    model.attention.out_bias = False  # bias on the output projection
    model.attention.scale = 0.0  # of the scores; 0 = head_dim ** -0.5
    model.attention.backend = "blocked"  # name in jaxlm.model.backends.BACKENDS
    model.attention.tile_q = 0  # splash: queries of a tile, a multiple of 128; 0 = by rule
    model.attention.tile_k = 0  # splash: keys of a tile, likewise
    model.attention.context = "gather"  # over columns that mesh.sequence splits: gather | ring | ulysses

    # R, numbers a token from which keys and values of all heads are made; 0 = plain attention
    model.attention.latent.kv_rank = 0
    model.attention.latent.q_rank = 0  # likewise of the queries; 0 = they are made of the stream itself
    model.attention.latent.nope_dim = 0  # of a query or key head, does not rotate
    model.attention.latent.rope_dim = 0  # of a query head, rotates; the keys of all heads share theirs
    model.attention.latent.value_dim = 0  # of a value head
    model.attention.latent.norm_eps = 1e-06  # of the norms of both ranks

    model.position.kind = "rope"  # rope | alibi | learned | sinusoidal | t5 | none
    model.position.theta = 10000.0  # RoPE base: pair i turns theta ** (-2 i / R) radians per token
    model.position.local_theta = 0.0  # RoPE base of local layers, then not scaled; 0 = as global layers
    model.position.fraction = 1.0  # leading share of head_dim that rotates (partial RoPE)
    # pairs are (0, 1), (2, 3).. as in GPT-J; default pairs are (i, i + R/2)
    model.position.interleaved = False
    model.position.scaling = "none"  # none | linear | ntk | dynamic | yarn | llama3 | longrope
    model.position.factor = 1.0  # context extension ratio, >= 1
    model.position.original_length = 0  # tokens of context before extension (yarn, llama3)
    # llama3: wavelengths above original_length / this are fully interpolated
    model.position.low_freq_factor = 1.0
    model.position.high_freq_factor = 4.0  # llama3: wavelengths below original_length / this are left alone
    model.position.beta_fast = 32.0  # yarn: pairs with more turns than this in original_length are left alone
    model.position.beta_slow = 1.0  # yarn: pairs with fewer turns than this are fully interpolated
    model.position.beta_round = True  # yarn: the pairs of these numbers of turns are rounded outwards
    # longrope: what each pair's frequency is divided by, and from more than original_length positions on
    model.position.short_factors = ()
    model.position.long_factors = ()
    model.position.attention_factor = 0.0  # multiplies cos and sin; 0 = by formula (yarn: 0.1 ln factor + 1)
    model.position.max_length = 0  # positions in the learned table
    model.position.offset = 0  # learned: row of position 0 (OPT: 2)
    model.position.bias_scale = 1.0  # alibi: multiplies the slopes
    model.position.num_buckets = 32  # t5: rows of the bias table
    model.position.max_distance = 128  # t5: distances from here on share the last bucket
    model.position.sines = "interleaved"  # sinusoidal: order and range of frequencies, see `sinusoidal`

    model.readout.classes = 0  # logits of a linear layer over the hidden states; 0 = none
    model.readout.of = "first"  # first | last | mean: of a row's tokens | each: one by one
    model.readout.dense = ""  # activation after a D x D layer before them (BERT's pooler: tanh); "" = none
    model.readout.bias = True  # on the logits

    model.disentangled.span = 0  # distances to either side that are told apart, at least nearly; 0 = none are
    # c2p: content of the query, p2c: of the key, each against the distance (DeBERTa)
    model.disentangled.terms = ("c2p", "p2c")
    # rows to either side, half of them for the nearest distances; 0 = one a distance
    model.disentangled.buckets = 0
    model.disentangled.shared = (
        True  # distances go through the projections of keys and queries, not their own
    )
    model.disentangled.norm = False  # the table is normalised

    # W, tokens that a convolution beside the first layer sees, half of them on either side; odd; 0 = none
    model.convolution.width = 0
    model.convolution.activation = "tanh"  # name in jaxlm.model.layers.ACTIVATIONS

    model.moe.num_experts = 0  # E; 0 = the model has no MoE layers
    model.moe.top_k = 2  # experts per token
    model.moe.expert_dim = 0  # width of each expert; 0 = mlp_dim
    model.moe.shared_experts = 0  # experts that every token passes through, each expert_dim wide
    model.moe.shared_dim = 0  # width of all shared experts together; 0 = shared_experts times an expert's
    model.moe.bias = False  # biases on the router's logits and on the experts' projections (GPT-OSS)
    model.moe.shared_gate = False  # their output times sigmoid(x w), a number per token (Qwen2-MoE)
    model.moe.router = "softmax"  # scores: softmax over experts | sigmoid of each (DeepSeek-V3)
    # equal groups of neighbouring experts, of which a token may use the best `top_groups`
    model.moe.groups = 1
    model.moe.top_groups = 1  # those with the largest scores (DeepSeek-V2: n_group, topk_group)
    # a group's score is the sum of its so many best experts' (DeepSeek-V3: 2)
    model.moe.group_best = 1
    model.moe.normalize = True  # weights of the chosen experts sum to 1 (times routed_scale)
    model.moe.routed_scale = 1.0  # multiplies the weights
    model.moe.dispatch = "dropless"  # dropless | capacity
    model.moe.capacity_factor = 1.25  # C = ceil(this * T * top_k / E) tokens per expert and row (capacity)
    model.moe.dropless_backend = "auto"  # auto | dense | loop | ragged, see `dropless_backend`
    model.moe.exchange = "auto"  # dropless, between devices: auto | ragged | padded, see jaxlm.model.dispatch
    model.moe.buffer_factor = 0.0  # dropless: choices a device can receive, over its fair share; 0 = all
    model.moe.rounds = (
        1  # dropless: a device's tokens go to their experts in that many parts: smaller buffers
    )
    model.moe.load_balance = 0.01  # coefficient of the load-balance loss
    model.moe.router_z = 0.001  # coefficient of the router z-loss
    # loss-free balancing: a learned bias per expert that moves selection only
    model.moe.bias_balancing = False

    model.encoder.num_layers = 0  # 0 = the model has no encoder
    model.encoder.num_heads = 0  # 0 = as many as the decoder's
    model.encoder.head_dim = 0  # 0 = attention.head_dim, or model_dim over these heads if that is 0 too
    model.encoder.mlp_dim = 0  # 0 = as wide as the decoder's
    model.encoder.vocab_size = 0  # of an embedding table of its own; 0 = it reads the decoder's

    # What to train on, in which order, and what to evaluate on.
    data = config.data
    # 'byte', a SentencePiece *.model, a Hugging Face tokenizer.json or a folder with one
    data.tokenizer = "byte"
    data.train = ""  # glob, 'glob=weight,glob=weight' or ((glob, weight), ...) of text or prepared folders
    data.eval = ""  # glob of the pinned eval set
    data.text_key = "text"  # JSON field or column of the text (seq2seq: of the input)
    data.target_key = ""  # field or column of the target or label, or '.de' = lines of the file beside
    data.classes = ()  # classification: the labels, as the field `target_key` spells them
    data.format = "lm"  # what a row asks of the model: lm, mlm, ..., see jaxlm.data.formats
    data.seq_len = 256  # T, targets in a row
    data.input_len = 0  # S, columns of the encoder's input
    data.decoder_start = "bos"  # what a decoder's first target is predicted from: bos | eos (BART) | pad (T5)
    data.with_bos = False  # inputs and targets of an encoder-decoder begin with BOS (BART)
    data.batch_size = 16  # B, rows of a step over all hosts
    data.packing = "concat"  # concat, first_fit or pad
    data.seed = 0  # of the order, and of the noise
    data.prefetch = 2  # batches made ahead of the step
    data.cache_dir = ""  # token shards of raw text; '' = beside the run directory
    data.workers = 0  # processes that tokenise raw text; 0 = all cores
    data.eval_tokens = 0  # evaluate on the first so many tokens; 0 = all

    data.noise.rate = 0.15  # share of a row's tokens that are hidden (BERT, T5: 0.15, BART: 0.3)
    data.noise.mean_span = 3.0  # mean length of the hidden spans
    data.noise.whole_words = False  # words are hidden with all their tokens
    data.noise.max_predictions = 0  # hidden tokens of a row at most; 0 = no limit (BERT: 20 of 128 columns)
    data.noise.permute = False  # sentences come in a random order
    data.noise.delete = 0.0  # share of the tokens that are left out without a trace
    data.noise.rotate = 0.0  # share of the rows that begin at a token drawn among theirs
    data.noise.variants = 0  # in how many ways a row is drawn; 0 = anew in each epoch (RoBERTa), BERT: 10

    # How parameters are updated. Fractions are shares of the run, regexes are searched in leaf names.
    optim = config.optim
    optim.name = "adamw"  # adamw | adafactor | lion | muon | sgd
    optim.lr = 0.0003  # peak learning rate
    optim.schedule = "cosine"  # constant | cosine | linear | wsd | inverse_sqrt, after the warm-up
    optim.final = 0.1  # learning rate at the end of the run (floor of inverse_sqrt), as a share of lr
    optim.warmup = 0.02  # length of the linear warm-up from 0, in warmup_unit
    optim.warmup_unit = "fraction"  # steps | tokens | fraction (of the run)
    optim.cooldown = 0.2  # wsd: share of the run spent going from lr to final
    optim.cooldown_shape = "1-sqrt"  # wsd: 1-sqrt | linear
    optim.b1 = 0.9  # AdamW: decay of the first moment; Lion: momentum's share of the update's direction
    optim.b2 = 0.95  # AdamW: decay of the second moment; Lion: decay of the momentum (0.99 is usual)
    optim.eps = 1e-08  # added to AdamW's root second moment
    optim.momentum = 0.95  # SGD (heavy ball, 0 = none) and Muon (Nesterov)
    optim.weight_decay = 0.1  # decoupled: each update subtracts lr * multiplier * weight_decay * parameter
    # leaves that are not decayed; leaves of fewer than two dimensions never are
    optim.no_decay = (
        r"(^|/)(scale|bias|sinks|router_b(ias)?|b[qkvo](_rel)?|b_\w+|\w*norm)$"
        r"|(^|/)(position_bias|distances)/"
    )
    optim.clip_norm = 1.0  # largest global gradient norm; 0 = no clipping
    optim.multipliers = ()  # (regex, factor) pairs on the learning rate; all that match multiply
    optim.ema = 0.0  # decay of an average of the parameters kept beside them; 0 = none
    optim.muon_rms = 0.2  # Muon: RMS of an update at lr 1; 0 = scale by sqrt(max(1, columns / rows))
    # Muon: matrices that take AdamW, as all vectors do
    optim.muon_skip = "(^|/)(embed|head|classifier)/|(^|/)(router_w|shared_gate)$"
    optim.factor_min = 128  # Adafactor: matrices with fewer rows or columns keep a whole second moment
    optim.parameter_scale = False  # Adafactor: multiply each update by its parameter's RMS (at least 1e-3)
    optim.low_precision = "master"  # bf16 parameters: master (float32 copies) | stochastic (random rounding)
    optim.router_bias_rate = 0.001  # step of loss-free expert balancing; has no schedule

    # What is added to the negative log-likelihood, and how much of it is computed at a time.
    loss = config.loss
    loss.z_loss = 0.0  # weight of logsumexp(logits)^2, which keeps logits near normalised (PaLM: 1e-4)
    loss.label_smoothing = 0.0  # share of each target that is spread evenly over the vocabulary
    loss.chunk = 64  # columns of the batch, all rows, whose logits exist at a time; 0 = all, by autodiff
    loss.per_position = False  # report the loss at each position in its document, too

    # Sizes of the mesh axes; -1 on one of them takes all devices that the others leave.
    mesh = config.mesh
    mesh.data = -1  # replicas of the parameters, each with its own rows of the batch
    mesh.fsdp = 1  # parameters, gradients and optimizer state split along `embed`; rows split too
    mesh.tensor = 1  # heads, mlp and vocabulary split (Megatron layout)
    mesh.expert = 1  # experts split; rows split too
    mesh.sequence = 1  # columns of the batch split (context parallelism)
    mesh.pipe = 1  # layers split into stages
    # parts of a batch that follow each other through the stages; 0 = one a stage
    mesh.pipe_microbatches = 0
    mesh.pipe_repeats = 1  # blocks of layers a stage holds: 1 = GPipe, more = circular (smaller bubble)
    mesh.slices = 1  # groups of devices with fast links, joined by a data-centre network
    mesh.dcn = "data"  # the axis that crosses it: data | pipe; the others stay inside a slice
    mesh.rules = ()  # (logical axis, mesh axes) pairs that replace those of RULES
    mesh.compute_rules = ()  # likewise of COMPUTE: weights where they are used
    mesh.reduce_dtype = "float32"  # in which weight gradients are summed over devices: float32 | bfloat16
    mesh.offload = "none"  # in the host's memory: none | optimizer (its state) | all (and layers, gradients)
    mesh.compiler_options = ()  # (name, value) for the compiler of the train step
    # the command chooses sizes (and `embed`'s rule) for its hardware: --config.mesh=auto
    mesh.auto = False

    # What the loop does and how often; steps count updates of the parameters.
    train = config.train
    train.num_steps = 1000  # updates in the whole run
    # parts into which a step's batch is cut, one after another; same update, less memory
    train.microbatches = 1
    train.log_every = 10  # steps between lines of metrics
    train.eval_every = 0  # steps between evaluations; 0 = at the end only
    train.sample_every = 0  # steps between samples; 0 = at the end only
    train.save_every = 0  # steps between checkpoints; 0 = at the end and on SIGTERM only
    train.keep_last = 2  # newest checkpoints kept
    train.keep_best = 1  # checkpoints with the lowest eval/nll kept beside them
    train.keep_period = 0  # checkpoints at multiples of this are kept for ever; 0 = none
    train.plot_every = 0  # steps between drawings of loss.png; 0 = at the end only
    train.max_nonfinite = 10  # this many skipped updates in a row stop the job; 0 = never
    train.noise_scale_every = 0  # steps between measurements of the gradient noise scale; 0 = never
    train.profile_start = 0  # first profiled step; 0 = no profile
    train.profile_steps = 3  # length of the profiled window
    train.peak_flops = 0.0  # peak FLOP/s of one device, for MFU; 0 = look the device up
    train.compilation_cache = True  # keep compiled programs in the run directory's parent
    train.warm_start = ""  # run directory or checkpoint whose parameters to start from
    train.warm_start_rename = ()  # (regex, replacement) on the names of its leaves
    train.warm_start_missing = ()  # regexes; leaves of the model that it need not hold
    # run directory of a trunk whose whole state to start from; relative to our parent
    train.branch_from = ""
    train.branch_step = 0  # updates of the trunk before the branch
    train.save_steps = ()  # checkpoints of these steps are written and kept for ever
    train.sample_prompts = ("",)  # prompts of the periodic samples; "" = from the start of a document

    # How one request is continued; the defaults sample from the model's own distribution.
    sample = config.sample
    sample.max_new_tokens = 128  # at most this many tokens, the end-of-sequence token included
    sample.temperature = 1.0  # logits are divided by it; 0 = greedy
    sample.top_k = 0  # keep the k most likely tokens (all that tie with the k-th); 0 = off
    sample.top_p = 1.0  # keep the smallest set of most likely tokens of at least this probability; 1 = off
    sample.min_p = 0.0  # keep tokens at least this share of the likeliest one's probability; 0 = off
    # tokens of prompt and text: logit / penalty if positive, else * penalty; 1 = off
    sample.repetition_penalty = 1.0
    sample.stop = ()  # text ends before the first of these strings
    sample.ignore_eos = False  # go on after the end-of-sequence token
    sample.seed = 0  # the request's own seed: its text does not depend on the batch it is in

    if size == "smoke":
        stdlib = os.path.dirname(os.__file__)
        data.train, data.eval = f"{stdlib}/asyncio/*.py", f"{stdlib}/json/*.py"
        data.seq_len = 64
        model.num_layers, model.model_dim = 2, 64
        optim.lr = 2e-3
        train.num_steps, train.log_every = 20, 5
        train.eval_every = train.save_every = 10
    return config
