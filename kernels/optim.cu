// The optimisers, over all parameters in one launch: a table says where each parameter and its state lie, another which piece
// of which parameter a block updates. What changes from step to step lies in memory, so that a captured step can be replayed.
#include "common.cuh"

const int PIECE = 4096;  // elements of a block

struct ParameterEntry {
    Out<float> value;
    In<float> gradient;
    Out<float> first;   // Adam: first moment; SGD: velocity
    Out<float> second;  // Adam: second moment; SGD: null
    i64 n;
    int group, unused;
};

struct PieceEntry {
    int parameter, piece;
};

// Of a group of parameters, for this step.
struct AdamScalars {
    float keep, step_size, correction, one_minus_beta1, beta2, one_minus_beta2, eps, unused;
};
struct SgdScalars {
    float lr, weight_decay, momentum, nesterov;
};

template <class Scalars> struct OptimParams {
    In<ParameterEntry> parameters;
    In<PieceEntry> pieces;     // one a block
    In<Scalars> scalars;       // one a group
    In<float> guard;           // (1) or null: the loss; unless it is finite nothing is changed
};

DEVICE bool may_update(In<float> guard) {
    if (!guard) return true;
    const float loss = guard[0];
    return loss - loss == 0.0f;
}

// Kingma and Ba, 2015, with decoupled weight decay (Loshchilov and Hutter, 2019), in PyTorch's order of operations.
KERNEL(adam, OptimParams<AdamScalars>, 256) {
    const PieceEntry piece = p.pieces[blockIdx.x];
    const ParameterEntry e = p.parameters[piece.parameter];
    const AdamScalars s = p.scalars[e.group];
    if (!may_update(p.guard)) return;
    const i64 begin = static_cast<i64>(piece.piece) * PIECE, end = min(begin + PIECE, e.n);
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float g = e.gradient[i];
        float m = e.first[i], v = e.second[i];
        m += (g - m) * s.one_minus_beta1;
        v = v * s.beta2 + s.one_minus_beta2 * g * g;
        e.first[i] = m;
        e.second[i] = v;
        e.value[i] = e.value[i] * s.keep - s.step_size * (m / (sqrtf(v) / s.correction + s.eps));
    }
}

KERNEL(sgd, OptimParams<SgdScalars>, 256) {
    const PieceEntry piece = p.pieces[blockIdx.x];
    const ParameterEntry e = p.parameters[piece.parameter];
    const SgdScalars s = p.scalars[e.group];
    if (!may_update(p.guard)) return;
    const i64 begin = static_cast<i64>(piece.piece) * PIECE, end = min(begin + PIECE, e.n);
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float value = e.value[i], g = e.gradient[i] + s.weight_decay * value;
        const float velocity = e.first[i] * s.momentum + g;
        e.first[i] = velocity;
        e.value[i] = value - s.lr * (s.nesterov != 0.0f ? g + s.momentum * velocity : velocity);
    }
}

struct ClipParams {
    In<float> squares;  // (n): sums of squares of the gradients
    Out<float> clip;    // (1)
    Out<float> norm;    // (1)
    float max;
    int n;
};

// PyTorch's clip_grad_norm_. One warp.
KERNEL(clip_factor, ClipParams, 32) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.n; i += WARP) sum += p.squares[i];
    sum = warp_sum(sum);
    if (threadIdx.x > 0) return;
    const float norm = sqrtf(sum), factor = p.max / (norm + 1e-6f);
    p.norm[0] = norm;
    p.clip[0] = factor < 1.0f ? factor : 1.0f;
}
