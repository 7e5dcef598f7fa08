// The living communicators of this process.
#pragma once

#include <string>

namespace softnpu::hccl {

class Comm;

void register_comm(Comm* comm);
void forget_comm(Comm* comm);
std::string lost_anywhere();  // a lost rank of any of them; "" when there is none

}  // namespace softnpu::hccl
