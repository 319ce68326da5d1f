// Looks for signals while a kernel runs, about ten times a second: Ctrl+C ends a long call. Only the calling thread can
// ask Python; the others see its answer. Defined in bindings.cpp, outside all instruction sets.
#pragma once

#include <pthread.h>
#include <stdint.h>

namespace kssm {

class Watch {
 public:
  // signalled: runs Python's handlers; true if one raised
  explicit Watch(bool (*signalled)());

  // Whether to stop. work: what was done since the last question, in vectors of oscillators.
  bool stop(int64_t work);
  bool stopped() const;
  bool on_caller() const;

 private:
  bool (*const signalled_)();
  const pthread_t caller_;
  int64_t due_, budget_;
  bool stopped_ = false;
};

}  // namespace kssm
