// The activations of the MLPs and their derivatives.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace fastvlm {
namespace CPU_CAPABILITY {

// The normal distribution's upper tail at |x|, erfc(|x| / sqrt 2) / 2 = exp(-x^2 / 2) t Q(t) with
// t = 1 / (1 + |x| / 4): one polynomial, fitted to a relative error of 1e-8, serves all of the
// line.
inline Vec normal_tail(Vec x, Vec exp_half_square) {
  const Vec t = broadcast(1.0f) / (broadcast(1.0f) + abs(x) * broadcast(0.25f));
  Vec q = broadcast(0.0165063292f);
  q = q * t + broadcast(-0.0623418465f);
  q = q * t + broadcast(0.0504533239f);
  q = q * t + broadcast(0.0302492827f);
  q = q * t + broadcast(0.010998223f);
  q = q * t + broadcast(0.0877039433f);
  q = q * t + broadcast(0.071586594f);
  q = q * t + broadcast(0.0956167877f);
  q = q * t + broadcast(0.0994786397f);
  q = q * t + broadcast(0.0997487232f);
  return exp_half_square * (t * q);
}
inline Vec exp_half_square(Vec x) { return exp(x * x * broadcast(-0.5f)); }

// x Phi(x), from the tail itself on either side: 1 + erf(x) would cancel for negative x.
inline Vec gelu_erf(Vec x) {
  const Vec tail = normal_tail(x, exp_half_square(x));
  return x * select(x < Vec{}, tail, broadcast(1.0f) - tail);
}
// Its derivative, Phi(x) + x phi(x).
inline Vec gelu_erf_slope(Vec x) {
  const Vec e = exp_half_square(x), tail = normal_tail(x, e);
  const Vec below = select(x < Vec{}, tail, broadcast(1.0f) - tail);
  return below + x * e * broadcast(0.3989422804f);
}

// x / (1 + exp(-2u)) is 0.5 x (1 + tanh u) without its cancellation.
inline Vec gelu_tanh(Vec x) {
  const Vec u = x * (broadcast(-1.5957691216f) + broadcast(-0.0713548163f) * x * x);
  return x / (broadcast(1.0f) + exp(u));
}
// With s = 1 / (1 + exp(-2u)), s + x s (1 - s) 2u'. Past 30 it is 0 or 1 to the last bit, and its
// terms would overflow.
inline Vec gelu_tanh_slope(Vec x) {
  x = at_most(at_least(x, broadcast(-30.0f)), broadcast(30.0f));
  const Vec square = x * x, one = broadcast(1.0f);
  const Vec e = exp(x * (broadcast(-1.5957691216f) + broadcast(-0.0713548163f) * square));
  const Vec s = one / (one + e);
  const Vec inner = broadcast(1.5957691216f) + broadcast(0.2140644488f) * square;
  return s + x * inner * s * (one - s);
}

// A NaN stays one, as in PyTorch.
inline Vec relu(Vec x) { return at_least(x, Vec{}); }
inline Vec relu_slope(Vec x) { return select(x <= Vec{}, Vec{}, broadcast(1.0f)); }

// x / (1 + exp(-x)).
inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exp(-x)); }
// With s = 1 / (1 + exp(-x)), s + x s (1 - s), where 1 - s = s exp(-x) does not cancel. Past 88 it
// is 0 or 1 to the last bit, and its terms would overflow.
inline Vec silu_slope(Vec x) {
  x = at_most(at_least(x, broadcast(-88.0f)), broadcast(88.0f));
  const Vec e = exp(-x), s = broadcast(1.0f) / (broadcast(1.0f) + e);
  return s + x * s * (s * e);
}

FASTVLM_INLINE Vec activated(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return gelu_erf(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: return relu(x);
    case Activation::kSilu: return silu(x);
  }
  return x;
}

// The same for a result that is rounded to bfloat16 or fewer bits, to a relative error of 2^-12:
// the polynomial of normal_tail with fewer terms, and no division.
FASTVLM_INLINE Vec roughly_activated(Vec x, Activation activation) {
  const Vec one = broadcast(1.0f), square = x * x;
  switch (activation) {
    case Activation::kGelu: {
      const Vec t = rough_reciprocal(one + abs(x) * broadcast(0.25f));
      Vec q = broadcast(0.0439640347f);
      q = q * t + broadcast(0.113338157f);
      q = q * t + broadcast(0.0376177556f);
      q = q * t + broadcast(0.107261304f);
      q = q * t + broadcast(0.0980729281f);
      q = q * t + broadcast(0.099792382f);
      const Vec tail = rough_exp2(square * broadcast(-0.72134752f)) * (t * q);
      return x * select(x < Vec{}, tail, one - tail);
    }
    case Activation::kGeluTanh: {
      const Vec u = x * (broadcast(-2.3022082f) + broadcast(-0.10294324f) * square);
      return x * rough_reciprocal(one + rough_exp2(u));
    }
    case Activation::kSilu: {
      return x * rough_reciprocal(one + rough_exp2(x * broadcast(-1.44269504f)));
    }
    case Activation::kRelu: return relu(x);
  }
  return x;
}

// body(std::integral_constant), so that a loop asks once which one it is.
template <class Body>
FASTVLM_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kGelu: return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu: return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu: return body(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

inline Vec activation_slope(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kGelu: return gelu_erf_slope(x);
    case Activation::kGeluTanh: return gelu_tanh_slope(x);
    case Activation::kRelu: return relu_slope(x);
    case Activation::kSilu: return silu_slope(x);
  }
  return x;
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvlm
