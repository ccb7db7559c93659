// Memory that lies in RAM up to a limit and in mapped files beyond it.
#pragma once

#include <cstddef>
#include <map>
#include <memory_resource>
#include <string>

namespace archer_fast {

// A few large pieces, each in RAM while those there stay within `max_ram_bytes` in all, else in a file of its own in
// `folder`. The file has no name any more when it is handed out, so it is gone with its piece, and with the
// process however that ends. Its whole room on the disk is taken at once: a full disk is an exception of `allocate`,
// and never a SIGBUS of somebody who writes later. (A folder on a file system in memory, as /tmp often is, spares no
// RAM.)
//
// Owner: the caller returns every piece before this dies.
// Threads: none of its own rules; whoever owns it locks.
// Complexity: O(log pieces) beside what the system takes.
// Errors of allocate: std::bad_alloc (RAM, or addresses), std::system_error that names the folder (no such folder,
// not writeable, disk full, too many open files); nothing is left behind.
class SpillMemory final : public std::pmr::memory_resource {
 public:
  SpillMemory(std::size_t max_ram_bytes, std::string folder);
  SpillMemory(const SpillMemory&) = delete;
  SpillMemory& operator=(const SpillMemory&) = delete;
  ~SpillMemory() override;

  std::size_t ram_bytes() const noexcept { return ram_bytes_; }        // handed out from RAM
  std::size_t mapped_bytes() const noexcept { return mapped_bytes_; }  // handed out from files

  // Asks the kernel to read [data, data + bytes) in, where it lies in a file: so that the disk works on many places at
  // once. Returns at once, and does nothing for what lies in RAM.
  void will_need(const std::byte* data, std::size_t bytes) const noexcept;

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override;
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) noexcept override;
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  const std::size_t max_ram_bytes_;
  const std::string folder_;
  std::size_t ram_bytes_ = 0;
  std::size_t mapped_bytes_ = 0;
  std::map<const std::byte*, std::size_t> mapped_;  // begin and size of every piece in a file
};

}  // namespace archer_fast
