// Softmax cross-entropy of logits (rows, classes), a warp a row. PyTorch's targets: the label's class, smoothed towards all
// classes alike, each class times its weight.
#include "common.cuh"

struct LossParams {
    In<float> logits;         // (rows, classes)
    In<i64> labels;           // (rows)
    In<float> class_weights;  // (classes) or null
    Out<float> log_p;         // (rows, classes)
    Out<float> losses;        // (rows)
    Out<float> weights;       // (rows): of the row's label
    int rows, classes;
    float smoothing;
    int unused;
};

DEVICE float class_weight(In<float> weights, int c) { return weights ? float(weights[c]) : 1.0f; }

DEVICE float target(In<float> weights, float smoothing, int label, int c, int classes) {
    const float share = (c == label ? 1.0f - smoothing : 0.0f) + smoothing / classes;
    return share * class_weight(weights, c);
}

KERNEL(cross_entropy, LossParams, 256) {
    const int row = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // The whole warp leaves together.
    if (row >= p.rows) return;
    const In<float> logits = p.logits + static_cast<i64>(row) * p.classes;
    const Out<float> log_p = p.log_p + static_cast<i64>(row) * p.classes;
    const i64 given = p.labels[row];
    // The host has checked labels that it knows; one that is out of range all the same must not be read with.
    const bool bad = given < 0 || given >= p.classes;
    const int label = bad ? 0 : static_cast<int>(given);
    float largest = -1.0f / 0.0f;
    for (int c = lane; c < p.classes; c += WARP) largest = Max()(largest, logits[c]);
    largest = warp_max(largest);
    float sum = 0.0f;
    for (int c = lane; c < p.classes; c += WARP) sum += expf(logits[c] - largest);
    const float log_sum = logf(warp_sum(sum));
    float loss = 0.0f;
    for (int c = lane; c < p.classes; c += WARP) {
        const float x = logits[c] - largest - log_sum;
        log_p[c] = x;
        // Without smoothing the other classes have no part, whatever their probability: 0 * -inf would be NaN.
        if (p.smoothing > 0.0f || c == label) loss -= x * target(p.class_weights, p.smoothing, label, c, p.classes);
    }
    loss = warp_sum(loss);
    if (lane > 0) return;
    p.losses[row] = bad ? 0.0f / 0.0f : loss;
    p.weights[row] = class_weight(p.class_weights, label);
}

struct LossSumParams {
    In<float> losses;
    In<float> weights;
    Out<float> loss;    // (1)
    Out<float> factor;  // (1): what each row's loss was multiplied with
    int rows, mean;
};

// The sum, or the mean weighted by the labels' classes. One warp.
KERNEL(cross_entropy_sum, LossSumParams, 32) {
    float loss = 0.0f, weight = 0.0f;
    for (int i = threadIdx.x; i < p.rows; i += WARP) {
        loss += p.losses[i];
        weight += p.weights[i];
    }
    loss = warp_sum(loss);
    weight = warp_sum(weight);
    if (threadIdx.x > 0) return;
    const float factor = p.mean ? 1.0f / weight : 1.0f;
    p.loss[0] = loss * factor;
    p.factor[0] = factor;
}

struct LossBackwardParams {
    In<float> log_p;
    In<i64> labels;
    In<float> class_weights;
    In<float> factor;  // (1), of the forward pass
    In<float> dloss;   // (1)
    Out<float> dlogits;
    int rows, classes;
    float smoothing;
    int unused;
};

KERNEL(cross_entropy_backward, LossBackwardParams, 256) {
    const int row = blockIdx.x * 8 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= p.rows) return;
    const float factor = p.factor[0] * p.dloss[0];
    const i64 given = p.labels[row];
    const int label = given < 0 || given >= p.classes ? 0 : static_cast<int>(given);
    float total = 0.0f;
    for (int c = lane; c < p.classes; c += WARP) total += target(p.class_weights, p.smoothing, label, c, p.classes);
    total = warp_sum(total);
    for (int c = lane; c < p.classes; c += WARP) {
        const i64 i = static_cast<i64>(row) * p.classes + c;
        p.dlogits[i] = factor * (expf(p.log_p[i]) * total - target(p.class_weights, p.smoothing, label, c, p.classes));
    }
}
