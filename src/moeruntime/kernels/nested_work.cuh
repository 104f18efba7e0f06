// What the kernels of nested experts are to do: which tokens are multiplied together, and by which block. Nothing here
// is of the device alone but the names: tests/unit/test_nested_work.py compiles it for a CPU.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct Face {
    i64 slot, bits, step, at4, at2, at1;
};

struct Unit { // tokens of one face
    i64 at4, at2, at1;
    int face, slot, bits, step;
    int first, tokens; // in `pairs`, and how many from there on: 0 where there is no work
    int tile;          // which of all tiles is the first one of these tokens
    int units;         // of the first one: how many there are
};

#ifndef TILE_TOKENS
#define TILE_TOKENS 4
#endif
constexpr int TILE = TILE_TOKENS; // tokens of a face, side by side; tiles of all faces are numbered, face by face
constexpr int MOST_TILES = 12; // of faces that meet

__device__ __forceinline__ int tiles_for(int count) { return (count + TILE - 1) / TILE; }

struct Bytes { // one for each tile
    u32 words[MOST_TILES / 4];
    // Where the bytes are in registers, which cannot be counted up.
    __device__ __forceinline__ int operator[](int at) const {
        const u32 word = at < 4 ? words[0] : at < 8 ? words[1] : words[2];
        return word >> 8 * (at & 3) & 0xFF;
    }
    __device__ __forceinline__ void set(int at, int value) { ((u8 *)words)[at] = (u8)value; }
};

struct Meeting { // of faces of a slot that have as many private bits, in tiles
    int first[MOST_TILES]; // of a tile: in `pairs`
    Bytes tokens;          // and how many from there on
    int tile[MOST_TILES];  // which of all tiles it is; an empty one has the number after its face's
    Bytes faces, steps;
    Bytes sizes; // how many tiles, from here on, are multiplied as one face's: 4, 2 or 1
    int slot, bits, tiles;
    int meetings;     // of the first one: how many there are
    int cost, before; // of a step, in small units, and that of the meetings before
};

constexpr int MOST_FACES = 128;

static_assert(sizeof(Unit) <= 4 * 48 && sizeof(Meeting) <= 4 * 48, "UNIT_WORDS of face_parts.py");

// What a step of a meeting costs, in multiplied tokens, and codes fetched and made ready for them.
__device__ __forceinline__ int cost_of(const Meeting &meeting) {
    int cost = 3 + (meeting.tiles + 3) / 4 * 5;
    for (int tile = 0; tile < meeting.tiles; tile += meeting.sizes[tile])
        cost += meeting.sizes[tile] == 4 ? 7 : meeting.sizes[tile] + 3;
    return cost;
}

// By one block, a thread for each face. Where faces may meet, a slot's that have as many private bits and up to
// `most_tokens` are listed in meetings of up to `meeting_tiles`, as even ones as there are. What takes four tiles of a
// face at once comes first, then what takes two, then what takes one, so that hardly any have to part. `tokens` of any
// other face are a unit.
__device__ void list_units(const Face *faces, const int *counts, int num_faces, Unit *units, int num_units, int tokens,
                           int capacity, Meeting *meetings, int meeting_tiles, int most_tokens) {
    __shared__ int num_of[MOST_FACES], kind_of[MOST_FACES], tiles_of[MOST_FACES], meetings_of[MOST_FACES];
    __shared__ int full_of[MOST_FACES];
    const int thread = threadIdx.x;
    for (int i = thread; i < num_units; i += MOST_FACES) units[i].tokens = 0;
    const Face face = thread < num_faces ? faces[thread] : Face{};
    const int count = thread < num_faces ? counts[thread] : 0, kind = (int)(4 * face.slot + face.bits);
    const bool may_meet = count > 0 && count <= most_tokens && (face.bits == 1 || face.bits == 2);
    const int full = tiles_for(count), tiles = full + (full % 4 == 3); // three as four, of which one is empty
    const int fours = tiles & ~3;
    kind_of[thread] = may_meet ? kind : -1;
    tiles_of[thread] = tiles;
    full_of[thread] = full;
    __syncthreads();
    int peers = 0, all = 0, all_fours = 0, all_twos = 0, fours_before = 0, twos_before = 0, ones_before = 0;
    int leader = thread; // the first of those that may meet
    if (may_meet)
        for (int other = 0; other < num_faces; other++) {
            if (kind_of[other] != kind) continue;
            const int its = tiles_of[other];
            if (other < thread) fours_before += its & ~3, twos_before += its & 2, ones_before += its & 1;
            all += its, all_fours += its & ~3, all_twos += its & 2;
            leader = min(leader, other);
            peers++;
        }
    const bool meets = peers > 1; // who is alone costs less by itself
    const int num_meetings = (all + meeting_tiles - 1) / meeting_tiles;
    num_of[thread] = meets ? 0 : (count + tokens - 1) / tokens;
    meetings_of[thread] = meets && leader == thread ? num_meetings : 0;
    __syncthreads();
    int at = 0, first_tile = 0;
    for (int other = 0; other < min(thread, num_faces); other++) at += num_of[other], first_tile += full_of[other];
    if (!meets) {
        for (int first = 0; first < count && at < num_units; first += tokens, at++)
            units[at] = {face.at4, face.at2, face.at1, thread, (int)face.slot, (int)face.bits, (int)face.step,
                         thread * capacity + first, min(tokens, count - first), first_tile + first / TILE};
    } else {
        int first_meeting = 0;
        for (int other = 0; other < leader; other++) first_meeting += meetings_of[other];
        // Meetings begin at even places, so that only fours can part, into twos.
        auto begin_of = [&](int index) {
            return min((index * all + 2 * num_meetings - 1) / (2 * num_meetings) * 2, all);
        };
        for (int tile = 0; tile < tiles; tile++) {
            const bool four = tile < fours, two = !four && tiles & 2;
            const int place = four  ? fours_before + tile
                              : two ? all_fours + twos_before + tile - fours
                                    : all_fours + all_twos + ones_before;
            const int index = min(place / 2 * 2 * num_meetings / all, num_meetings - 1);
            const int begin = begin_of(index), end = begin_of(index + 1), in = place - begin;
            Meeting &meeting = meetings[first_meeting + index];
            meeting.first[in] = thread * capacity + min(tile * TILE, count - 1);
            meeting.tokens.set(in, max(0, min(TILE, count - tile * TILE)));
            meeting.tile[in] = first_tile + tile;
            meeting.faces.set(in, thread);
            meeting.steps.set(in, (int)face.step);
            const bool aligned = four && tile % 4 == 0 && in % 4 == 0 && place + 4 <= end;
            meeting.sizes.set(in, aligned ? 4 : in % 2 == 0 && (four || two) ? 2 : 1);
            if (in == 0) {
                meeting.slot = (int)face.slot;
                meeting.bits = (int)face.bits;
                meeting.tiles = end - begin;
            }
        }
    }
    __syncthreads();
    if (thread == MOST_FACES - 1) units[0].units = min(at, num_units); // after all faces'
    if (most_tokens == 0) return;
    int listed = 0;
    for (int other = 0; other < num_faces; other++) listed += meetings_of[other];
    if (thread == 0) meetings[0].meetings = listed;
    for (int i = thread; i < listed; i += MOST_FACES) meetings[i].cost = cost_of(meetings[i]);
    __syncthreads();
    for (int i = thread; i < listed; i += MOST_FACES) {
        int before = 0;
        for (int other = 0; other < i; other++) before += meetings[other].cost;
        meetings[i].before = before;
    }
}

struct Piece { // of work: steps of a row tile of a meeting
    const Meeting *meeting;
    int tile, first, last;
};

// This block's share of the work, piece by piece: all blocks have as much to do. A row tile may be cut, once: what a
// block does first is then the end of a tile that the block before it begins, last of all. A row tile is STEPS.
template <int STEPS, class Do>
__device__ __forceinline__ void for_each_piece(const Meeting *meetings, int row_tiles, Do work) {
    const int num_meetings = meetings[0].meetings, steps = row_tiles * STEPS; // of a meeting
    const int total = (meetings[num_meetings - 1].before + meetings[num_meetings - 1].cost) * steps;
    int most = 0, index = 0;
    for (int i = 0; i < num_meetings; i++) most = max(most, meetings[i].cost);
    const int share = max((total + (int)gridDim.x - 1) / (int)gridDim.x, most * STEPS);
    const int begin = blockIdx.x * share, end = min(begin + share, total);
    for (int i = 0; i < num_meetings; i++) index += (meetings[i].before + meetings[i].cost) * steps <= begin;
    for (; index < num_meetings; index++) {
        const Meeting *const meeting = meetings + index;
        const int cost = meeting->cost, base = meeting->before * steps;
        if (base >= end) break;
        // Whoever comes first does the step that is cut.
        int step = (max(begin - base, 0) + cost - 1) / cost;
        const int last = min((end - base + cost - 1) / cost, steps);
        while (step < last) {
            const int tile = step / STEPS, until = min(last, (tile + 1) * STEPS);
            work(Piece{meeting, tile, step - tile * STEPS, until - tile * STEPS});
            step = until;
        }
    }
}
