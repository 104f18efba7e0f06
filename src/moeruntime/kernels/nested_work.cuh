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
constexpr int MOST_PARTS = 12, PART_TILES = 6; // of a meeting, and of a part

__device__ __forceinline__ int tiles_for(int count) { return (count + TILE - 1) / TILE; }

struct Meeting { // of faces of a slot, in parts of some tiles of one face
    int first[MOST_PARTS]; // of a part: in `pairs`
    int tile[MOST_PARTS];  // which of all tiles is the first
    u32 codes[MOST_PARTS]; // tiles, bits << 4 and step << 8
    u8 faces[MOST_PARTS], tokens[MOST_PARTS];
    int slot, parts, tiles;
    int meetings;     // of the first one: how many there are
    int cost, before; // of a step, in small units, and that of the meetings before
};

constexpr int MOST_FACES = 128;

static_assert(sizeof(Unit) <= 4 * 48 && sizeof(Meeting) <= 4 * 48, "UNIT_WORDS of face_parts.py");

// What a step of a meeting costs: codes are fetched and put together for each part, and multiplied with its tokens.
__device__ __forceinline__ int cost_of(const Meeting &meeting) {
    int cost = 6;
    for (int part = 0; part < meeting.parts; part++) {
        const int tiles = tiles_for(meeting.tokens[part]);
        cost += 10 + tiles + (tiles > 4 ? 3 : 0);
    }
    return cost;
}

// By one block, a thread for each face. Where faces may meet, a slot's that have up to `most_tokens` are listed in
// meetings of up to `meeting_tiles`, as even ones as there are: the tiles of one face after the other, cut where a
// meeting ends, and in parts of up to PART_TILES. `tokens` of any other face are a unit.
__device__ void list_units(const Face *faces, const int *counts, int num_faces, Unit *units, int num_units, int tokens,
                           int capacity, Meeting *meetings, int meeting_tiles, int most_tokens) {
    __shared__ int num_of[MOST_FACES], slot_of[MOST_FACES], tiles_of[MOST_FACES], meetings_of[MOST_FACES];
    const int thread = threadIdx.x;
    for (int i = thread; i < num_units; i += MOST_FACES) units[i].tokens = 0;
    const Face face = thread < num_faces ? faces[thread] : Face{};
    const int count = thread < num_faces ? counts[thread] : 0, tiles = tiles_for(count);
    const bool may_meet = count > 0 && count <= most_tokens;
    slot_of[thread] = may_meet ? (int)face.slot : -1;
    tiles_of[thread] = tiles;
    __syncthreads();
    int peers = 0, all = 0, begin = 0; // faces of the slot that may meet, their tiles, and those before this face's
    int leader = thread;               // the first of them
    if (may_meet)
        for (int other = 0; other < num_faces; other++) {
            if (slot_of[other] != slot_of[thread]) continue;
            if (other < thread) begin += tiles_of[other];
            all += tiles_of[other];
            leader = min(leader, other);
            peers++;
        }
    const bool meets = peers > 1; // who is alone costs less by itself
    const int num_meetings = (all + meeting_tiles - 1) / meeting_tiles;
    num_of[thread] = meets ? 0 : (count + tokens - 1) / tokens;
    meetings_of[thread] = meets && leader == thread ? num_meetings : 0;
    __syncthreads();
    int at = 0, first_tile = 0;
    for (int other = 0; other < min(thread, num_faces); other++) at += num_of[other], first_tile += tiles_of[other];
    if (!meets) {
        for (int first = 0; first < count && at < num_units; first += tokens, at++)
            units[at] = {face.at4, face.at2, face.at1, thread, (int)face.slot, (int)face.bits, (int)face.step,
                         thread * capacity + first, min(tokens, count - first), first_tile + first / TILE};
    } else {
        int first_meeting = 0;
        for (int other = 0; other < leader; other++) first_meeting += meetings_of[other];
        // A meeting's share of the slot's tiles, and what of a face's it has.
        auto begin_of = [&](int index) { return index * all / num_meetings; };
        auto parts_in = [&](int index, int from, int to) {
            const int shared = min(to, begin_of(index + 1)) - max(from, begin_of(index));
            return shared > 0 ? (shared + PART_TILES - 1) / PART_TILES : 0;
        };
        for (int index = 0; index < num_meetings; index++) {
            const int mine = parts_in(index, begin, begin + tiles);
            if (mine == 0) continue;
            int part = 0; // those of the faces before
            for (int other = leader, from = 0; other < thread; other++) {
                if (slot_of[other] != slot_of[thread]) continue;
                part += parts_in(index, from, from + tiles_of[other]);
                from += tiles_of[other];
            }
            Meeting &meeting = meetings[first_meeting + index];
            const int from = max(begin, begin_of(index)) - begin, until = min(begin + tiles, begin_of(index + 1)) - begin;
            for (int i = 0; i < mine; i++, part++) {
                const int at = from + i * (until - from) / mine, end = from + (i + 1) * (until - from) / mine;
                meeting.first[part] = thread * capacity + at * TILE;
                meeting.tile[part] = first_tile + at;
                meeting.faces[part] = (u8)thread;
                meeting.tokens[part] = (u8)(min(end * TILE, count) - at * TILE);
                meeting.codes[part] = (u32)(end - at) | (u32)face.bits << 4 | (u32)face.step << 8;
            }
            if (begin + tiles >= begin_of(index + 1)) { // the last
                meeting.slot = (int)face.slot;
                meeting.parts = part;
                meeting.tiles = begin_of(index + 1) - begin_of(index);
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
