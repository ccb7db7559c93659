// A lock that readers share and that lets nobody wait for ever.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace archer_fast {

// std::shared_mutex lets new readers in past a writer who waits: four threads that collate in a loop kept a push
// waiting for .8 s. Here whoever comes after a writer waits behind it.
//
// Use: std::shared_lock and std::unique_lock, by the aliases below. Not recursive.
class FairSharedMutex {
 public:
  void lock() {
    const std::lock_guard turn(turnstile_);
    mutex_.lock();
  }
  void unlock() { mutex_.unlock(); }
  void lock_shared() {
    const std::lock_guard turn(turnstile_);
    mutex_.lock_shared();
  }
  void unlock_shared() { mutex_.unlock_shared(); }

 private:
  std::mutex turnstile_;
  std::shared_mutex mutex_;
};

using ReadLock = std::shared_lock<FairSharedMutex>;
using WriteLock = std::unique_lock<FairSharedMutex>;

}  // namespace archer_fast
